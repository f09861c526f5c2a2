"""What SwiGLU must prove."""

from collections.abc import Callable

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.token_wise.swiglu import swiglu


def _swiglu_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {name: 2 * randn(generator, B, T, sizes["F"]) for name in ("gate", "up")}


GATE_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "open": lambda i: i | {"gate": i["gate"] * 0 + 30},
    "closed": lambda i: i | {"gate": i["gate"] * 0 - 30},
    "far": lambda i: i | {"gate": i["gate"] * 100},
}


SPECS = (
    OperatorSpec(
        name="swiglu",
        function=swiglu,
        make=_swiglu_inputs,
        state=None,
        sizes=({"F": 8}, {"F": 300}),
        time=("gate", "up"),
        extremes=GATE_EXTREMES,
        packed=False,
        any_rank=True,
    ),
)
