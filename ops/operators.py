"""The table of operators: one entry gives an operator every proof of the shared harness and a line in `zoo doctor`."""

import torch
from torch import Tensor

from zoo.ops.causal_conv1d import causal_conv1d
from zoo.ops.proof import Inputs, OperatorSpec, Sizes


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _conv_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    D, W = sizes["D"], sizes["W"]
    return {
        "x": _randn(generator, B, T, D),
        "weight": _randn(generator, D, W) * W**-0.5,
        "bias": _randn(generator, D),
    }


OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        OperatorSpec(
            name="causal_conv1d",
            function=causal_conv1d,
            make=_conv_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["W"] - 1, sizes["D"]),
            sizes=({"D": 8, "W": 4}, {"D": 70, "W": 2}, {"D": 5, "W": 1}),
            time=("x",),
            extremes={"zero": lambda i: i | {"x": i["x"] * 0}},
            cp_kind="halo",
        ),
    )
}
