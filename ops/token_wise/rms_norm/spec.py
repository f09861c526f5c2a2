"""What the norms must prove."""

import functools
from collections.abc import Callable

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.token_wise.rms_norm import ORDERS, gated_rms_norm, rms_norm
from zoo.ops.token_wise.swiglu.spec import GATE_EXTREMES


def _norm_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    shape = (B, T, sizes["H"], sizes["D"]) if "H" in sizes else (B, T, sizes["D"])
    return {"x": randn(generator, *shape), "weight": randn(generator, sizes["D"])}


def _gated_norm_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    made = _norm_inputs(B, T, sizes, generator)
    return made | {"gate": 2 * randn(generator, *made["x"].shape)}


_NORM_SIZES = ({"D": 8}, {"H": 2, "D": 100}, {"D": 300})
_NORM_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "zeros": lambda i: i | {"x": i["x"] * 0},
    "small": lambda i: i | {"x": i["x"] * 1e-4},
    "large": lambda i: i | {"x": i["x"] * 1e4},
}


SPECS = (
    OperatorSpec(
        name="rms_norm",
        function=rms_norm,
        make=_norm_inputs,
        state=None,
        sizes=_NORM_SIZES,
        time=("x",),
        extremes=_NORM_EXTREMES,
        packed=False,
        any_rank=True,
    ),
    *(
        OperatorSpec(
            name=f"gated_rms_norm_{order}",
            function=functools.partial(gated_rms_norm, order=order),
            make=_gated_norm_inputs,
            state=None,
            sizes=_NORM_SIZES,
            time=("x", "gate"),
            extremes=_NORM_EXTREMES | GATE_EXTREMES,
            packed=False,
            any_rank=True,
        )
        for order in ORDERS
    ),
)
