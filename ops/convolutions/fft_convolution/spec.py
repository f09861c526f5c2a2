"""What the long convolution must prove."""

import torch

from zoo.ops.convolutions.fft_convolution import fft_convolution
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    D, L = sizes["D"], sizes["L"]
    return {
        "u": randn(generator, B, T, D),
        "k": randn(generator, D, L) * torch.exp(-torch.arange(L) / 30.0),
        "D": randn(generator, D),
    }


SPECS = (
    OperatorSpec(
        name="fft_convolution",
        function=fft_convolution,
        make=_inputs,
        state=None,
        sizes=({"D": 6, "L": 200}, {"D": 3, "L": 50}, {"D": 3, "L": 1}),
        time=("u",),
        extremes={"zero": lambda i: i | {"u": i["u"] * 0}},
    ),
)
