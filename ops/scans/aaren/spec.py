"""What Aaren's attention must prove."""

import torch

from zoo.ops.core.algebra import LogSumExp
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.scans.aaren import aaren, aaren_summary


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, V = sizes["H"], sizes["V"]
    return {"s": randn(generator, B, T, H), "v": randn(generator, B, T, H, V)}


def _state(n: int, sizes: Sizes, generator: torch.Generator) -> LogSumExp:
    H, V = sizes["H"], sizes["V"]
    return LogSumExp(randn(generator, n, H), 1 + randn(generator, n, H).abs(), randn(generator, n, H, V))


def _growing(inputs: Inputs) -> Inputs:
    """Scores of 8 t, which leave nothing but the newest token."""
    t = torch.arange(inputs["s"].shape[1], dtype=torch.float64).view(1, -1, 1)
    return inputs | {"s": inputs["s"] + 8 * t}


def _falling(inputs: Inputs) -> Inputs:
    """Scores of -8 t, which leave nothing but the first token."""
    t = torch.arange(inputs["s"].shape[1], dtype=torch.float64).view(1, -1, 1)
    return inputs | {"s": inputs["s"] - 8 * t}


SPECS = (
    OperatorSpec(
        name="aaren",
        function=aaren,
        make=_inputs,
        state=_state,
        empty=lambda state: LogSumExp.identity(state[2]),
        sizes=({"H": 2, "V": 5}, {"H": 1, "V": 1}),
        time=("s", "v"),
        extremes={
            # without ties: where two scores are the largest, the derivative of m is anybody's
            "nearly equal scores": lambda i: i | {"s": i["s"] * 1e-3},
            "scores of hundreds": lambda i: i | {"s": i["s"] * 300},
            "scores that grow": _growing,
            "scores that fall": _falling,
        },
        summary=lambda i, cu: aaren_summary(i["s"], i["v"], cu_seqlens=cu),
    ),
)
