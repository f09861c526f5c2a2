"""What ParaLSTM must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.recurrent.para_lstm import para_lstm


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {
        "u": randn(generator, B, T, 3, sizes["D"]),
        "a": torch.clamp(0.7 * randn(generator, 3, sizes["D"]), -0.9, 0.9),
        "p": torch.clamp(0.7 * randn(generator, 2, sizes["D"]), -0.9, 0.9),
    }


SPECS = (
    OperatorSpec(
        name="para_lstm",
        function=para_lstm,
        make=_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["D"], 2),
        sizes=({"D": 5},),
        time=("u",),
        extremes={
            "a-0": lambda i: i | {"a": i["a"] * 0, "p": i["p"] * 0},
            "gates shut or open": lambda i: i | {"u": 40 * torch.sign(i["u"])},
        },
        iterated=True,
        resets=lambda i, where: i | {"resets": where},
    ),
)
