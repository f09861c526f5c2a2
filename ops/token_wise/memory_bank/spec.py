"""What the read from a memory bank must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.token_wise.memory_bank import memory_bank


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    D = sizes["D"]
    return {"x": randn(generator, B, T, D), "bank": randn(generator, sizes["M"], D) * D**-0.5}


SPECS = (
    OperatorSpec(
        name="memory_bank",
        function=memory_bank,
        make=_inputs,
        state=None,
        sizes=({"D": 8, "M": 5}, {"D": 20, "M": 33}, {"D": 3, "M": 1}),
        time=("x",),
        extremes={
            "one vector wins": lambda i: i | {"x": i["x"] * 100},
            "all alike": lambda i: i | {"x": i["x"] * 0},
        },
        packed=False,
    ),
)
