"""What the causal convolution must prove."""

from functools import partial

import torch

from zoo.ops.convolutions.causal_conv1d import causal_conv1d, causal_conv1d_summary, external
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn


def conv_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Random x (B, T, D), weight (D, W) scaled by W^-0.5, and bias (D,)."""
    D, W = sizes["D"], sizes["W"]
    return {
        "x": randn(generator, B, T, D),
        "weight": randn(generator, D, W) * W**-0.5,
        "bias": randn(generator, D),
    }


DILATION = 5  # no divisor of a chunk, nor of any length that is proved but 15, 65 and 200


SPECS = (
    OperatorSpec(
        name="causal_conv1d",
        function=causal_conv1d,
        make=conv_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["W"] - 1, sizes["D"]),
        sizes=({"D": 8, "W": 4}, {"D": 70, "W": 2}, {"D": 5, "W": 1}),
        time=("x",),
        extremes={"zero": lambda i: i | {"x": i["x"] * 0}},
        summary=lambda i, cu: causal_conv1d_summary(i["x"], i["weight"].shape[1], cu_seqlens=cu),
        library=lambda: external.PACKAGE if external.available() else "",
    ),
    OperatorSpec(
        name="causal_conv1d dilated",
        function=partial(causal_conv1d, dilation=DILATION, activation="silu"),
        make=conv_inputs,
        state=lambda n, sizes, generator: randn(generator, n, (sizes["W"] - 1) * DILATION, sizes["D"]),
        sizes=({"D": 8, "W": 4}, {"D": 70, "W": 2}, {"D": 5, "W": 13}, {"D": 5, "W": 1}),
        time=("x",),
        extremes={"zero": lambda i: i | {"x": i["x"] * 0}},
        summary=lambda i, cu: causal_conv1d_summary(i["x"], i["weight"].shape[1], dilation=DILATION, cu_seqlens=cu),
    ),
)
