"""What rotary position embeddings must prove."""

import functools

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.token_wise.rotary import LAYOUTS, rotary


def _rotary_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Positions of their own for every row; with `shared` one table for all."""
    angles = 100 * randn(generator, 1 if "shared" in sizes else B, T, sizes["K"] // 2)
    return {"x": randn(generator, B, T, sizes["H"], sizes["K"]), "cos": angles.cos(), "sin": angles.sin()}


SPECS = (
    *(
        OperatorSpec(
            name=f"rotary_{layout}",
            function=functools.partial(rotary, layout=layout),
            make=_rotary_inputs,
            state=None,
            sizes=({"H": 2, "K": 8}, {"H": 3, "K": 100}, {"H": 2, "K": 64, "shared": 1}),
            time=("x", "cos", "sin"),
            extremes={"no angle": lambda i: i | {"cos": i["cos"] * 0 + 1, "sin": i["sin"] * 0}},
            packed=False,
            any_rank=True,
        )
        for layout in LAYOUTS
    ),
)
