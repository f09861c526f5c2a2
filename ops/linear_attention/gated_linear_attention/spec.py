"""What gated linear attention must prove."""

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_every, at_some, randn
from zoo.ops.linear_attention.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary


def _gla_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    return {
        "q": randn(generator, B, T, H, K),
        "k": randn(generator, B, T, H, K),
        "v": randn(generator, B, T, H, V),
        "g": -F.softplus(2 * randn(generator, B, T, H, K)),  # the median step keeps half
    }


SPECS = (
    OperatorSpec(
        name="gated_linear_attention",
        function=gated_linear_attention,
        make=_gla_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
        sizes=(
            {"H": 2, "K": 8, "V": 16},
            {"H": 1, "K": 64, "V": 64},
            {"H": 1, "K": 100, "V": 128},
            {"H": 1, "K": 128, "V": 100},
        ),
        time=("q", "k", "v", "g"),
        extremes={
            "forget everything": lambda i: i | {"g": torch.full_like(i["g"], -8.0)},
            "forget nothing": lambda i: i | {"g": i["g"] * 0},
            "resets": lambda i: i | {"g": at_some(i["g"], -50.0)},
            "every second gate shuts": lambda i: i | {"g": at_every(i["g"], 2, -100.0)},
            "every fourth gate is strong": lambda i: i | {"g": at_every(i["g"] * 0.01, 4, -4.0)},
            "every eighth gate is strong": lambda i: i | {"g": at_every(i["g"] * 0.01, 8, -20.0)},
            "all gates at once": lambda i: (
                i
                | {"g": at_some(torch.where(i["g"] < -1.0, -8.0, torch.where(i["g"] < -0.5, 0.0, i["g"])), -50.0, 0.05)}
            ),
        },
        summary=lambda i, cu: gated_linear_attention_summary(i["k"], i["v"], i["g"], cu_seqlens=cu),
        resets=lambda i, where: i | {"g": i["g"].masked_fill(where[..., None, None], float("-inf"))},
    ),
)
