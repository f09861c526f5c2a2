"""What the time-invariant state spaces must prove."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.algebra import Matrix
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.state_spaces.s4 import s4, s4_summary, s4d, s4d_summary


class _OnPairs(NamedTuple):
    """The element of `s4`, which maps states (B, H, 2N, 1), on states (B, H, N, 2)."""

    M: Tensor
    b: Tensor

    def then(self, second: "_OnPairs", /) -> "_OnPairs":
        return _OnPairs(*Matrix(*self).then(Matrix(*second)))

    def apply(self, state: Tensor) -> Tensor:
        return Matrix(*self).apply(state.flatten(-2).unsqueeze(-1)).view(state.shape)


def _steps(H: int, generator: torch.Generator) -> Tensor:
    """dt between 0.003 and 0.3."""
    return torch.exp(0.8 * randn(generator, H) - 3)


def _rates(H: int, N: int, generator: torch.Generator) -> Tensor:
    """A in the left half-plane, with frequencies apart, (H, N, 2)."""
    slow = -0.5 * torch.exp(0.3 * randn(generator, H, N))
    return torch.stack([slow, torch.arange(N) * torch.pi + 0.3 * randn(generator, H, N)], dim=-1)


def _s4d_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, N = sizes["H"], sizes["N"]
    dt = _steps(H, generator)
    return {
        "u": randn(generator, B, T, H),
        "log_A": _rates(H, N, generator) * dt[:, None, None],
        "B": randn(generator, H, N, 2) * dt[:, None, None],
        "C": randn(generator, H, N, 2),
        "D": randn(generator, H),
    }


def _s4_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, N = sizes["H"], sizes["N"]
    return {
        "u": randn(generator, B, T, H),
        "A": _rates(H, N, generator),
        "P": randn(generator, H, N, 2),
        "B": randn(generator, H, N, 2),
        "C": randn(generator, H, N, 2),
        "dt": _steps(H, generator),
        "D": randn(generator, H),
    }


def _s4_summary(i: Inputs, cu: Tensor | None) -> Any:
    return _OnPairs(*s4_summary(i["u"], i["A"], i["P"], i["B"], i["dt"], cu_seqlens=cu))


def _with_real_part(log_A: Tensor, value: float) -> Tensor:
    return torch.stack([log_A[..., 0] * 0 + value, log_A[..., 1]], dim=-1)


SPECS = (
    OperatorSpec(
        name="s4d",
        function=s4d,
        make=_s4d_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["N"], 2),
        sizes=({"H": 3, "N": 4}, {"H": 2, "N": 17}),
        time=("u",),
        extremes={
            "no decay": lambda i: i | {"log_A": _with_real_part(i["log_A"], 0.0)},
            "instant decay": lambda i: i | {"log_A": _with_real_part(i["log_A"], -1e4)},
            "no rotation": lambda i: i | {"log_A": i["log_A"] * torch.tensor([1.0, 0.0])},
            "aliased rotation": lambda i: i | {"log_A": i["log_A"] * torch.tensor([1.0, 100.0])},
        },
        summary=lambda i, cu: s4d_summary(i["u"], i["log_A"], i["B"], cu_seqlens=cu),
        bounded_by_the_loop=False,
    ),
    OperatorSpec(
        name="s4",
        function=s4,
        make=_s4_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["N"], 2),
        sizes=({"H": 3, "N": 4}, {"H": 2, "N": 8}),
        time=("u",),
        extremes={
            "no low rank": lambda i: i | {"P": i["P"] * 0},
            "tiny steps": lambda i: i | {"dt": i["dt"] * 1e-3},
            "huge steps": lambda i: i | {"dt": i["dt"] * 1e3},
        },
        summary=_s4_summary,
    ),
)
