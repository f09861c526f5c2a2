"""What the delta rule must prove, without and with its gate."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_every, at_some, randn
from zoo.ops.linear_attention.delta_rule import delta_rule, delta_rule_summary


def _delta_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    return {
        "q": F.normalize(randn(generator, B, T, H, K), dim=-1) * K**0.5,
        "k": F.normalize(randn(generator, B, T, H, K), dim=-1),
        "v": randn(generator, B, T, H, V),
        "beta": 2 * torch.rand(B, T, H, generator=generator, dtype=torch.float64),
    }


def _gated_delta_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    made = _delta_inputs(B, T, sizes, generator)
    return made | {"g": F.logsigmoid(randn(generator, B, T, sizes["H"]) + 2)}


_DELTA_SIZES = (
    {"H": 1, "K": 64, "V": 64},
    {"H": 2, "K": 8, "V": 16},
    {"H": 1, "K": 100, "V": 128},
    {"H": 1, "K": 128, "V": 100},
)
_DELTA_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "beta-0": lambda i: i | {"beta": i["beta"] * 0},
    "beta-1": lambda i: i | {"beta": i["beta"] * 0 + 1},
    "beta-2": lambda i: i | {"beta": i["beta"] * 0 + 2},
    "one-key": lambda i: i | {"k": i["k"][:, :1].expand_as(i["k"]).contiguous()},
    # of length exactly 1: the sign of the state would otherwise drift by T rounding errors of k^T k, in any form
    "one-key-beta-2": lambda i: (
        i | {"k": (i["k"] * 0 + i["k"][:, :1]).sign() * i["k"].shape[-1] ** -0.5, "beta": i["beta"] * 0 + 2}
    ),
}
_GATED_DELTA_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "g-0": lambda i: i | {"g": i["g"] * 0},
    "g-8": lambda i: i | {"g": i["g"] * 0 - 8},
    "resets among weak gates": lambda i: i | {"g": at_some(i["g"] * 0.01, -50.0)},
    "every second gate shuts": lambda i: i | {"g": at_every(i["g"], 2, -100.0)},
    "every eighth gate is strong": lambda i: i | {"g": at_every(i["g"] * 0.01, 8, -20.0)},
    "g-8-beta-2": lambda i: i | {"g": i["g"] * 0 - 8, "beta": i["beta"] * 0 + 2},
    "one-key-beta-1": lambda i: i | {"k": i["k"][:, :1].expand_as(i["k"]).contiguous(), "beta": i["beta"] * 0 + 1},
}


SPECS = (
    OperatorSpec(
        name="delta_rule",
        function=delta_rule,
        make=_delta_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
        sizes=_DELTA_SIZES,
        time=("q", "k", "v", "beta"),
        extremes=_DELTA_EXTREMES,
        summary=lambda i, cu: delta_rule_summary(i["k"], i["v"], i["beta"], cu_seqlens=cu),
    ),
    OperatorSpec(
        name="gated_delta_rule",
        function=delta_rule,
        make=_gated_delta_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
        sizes=_DELTA_SIZES,
        time=("q", "k", "v", "beta", "g"),
        extremes=_GATED_DELTA_EXTREMES,
        summary=lambda i, cu: delta_rule_summary(i["k"], i["v"], i["beta"], i["g"], cu_seqlens=cu),
        resets=lambda i, where: i | {"g": i["g"].masked_fill(where.unsqueeze(-1), float("-inf"))},
    ),
)
