"""What bidirectional gated linear attention must prove."""

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_some, randn
from zoo.ops.linear_attention.bidirectional_gla import bidirectional_gla


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = (sizes[name] for name in "HKV")
    return {
        "q": randn(generator, B, T, H, K),
        "k": randn(generator, B, T, H, K),
        "v": randn(generator, B, T, H, V),
        "g": -F.softplus(2 * randn(generator, B, T, 2, H, K)),
    }


SPECS = (
    OperatorSpec(
        name="bidirectional_gla",
        function=bidirectional_gla,
        make=_inputs,
        state=None,
        sizes=({"H": 2, "K": 8, "V": 16}, {"H": 1, "K": 32, "V": 64}),
        time=("q", "k", "v", "g"),
        extremes={
            "forget everything": lambda i: i | {"g": i["g"] * 0 - 8},
            "forget nothing": lambda i: i | {"g": i["g"] * 0},
            "resets": lambda i: i | {"g": at_some(i["g"], -50.0)},
        },
        both_sides=True,
    ),
)
