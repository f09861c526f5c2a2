"""What the two-sided convolution must prove."""

from zoo.ops.convolutions.causal_conv1d.spec import conv_inputs
from zoo.ops.convolutions.depthwise_conv1d import depthwise_conv1d
from zoo.ops.core.spec import OperatorSpec

SPECS = (
    OperatorSpec(
        name="depthwise_conv1d",
        function=depthwise_conv1d,
        make=conv_inputs,
        state=None,
        sizes=({"D": 8, "W": 7}, {"D": 70, "W": 4}, {"D": 5, "W": 1}),
        time=("x",),
        extremes={"zero": lambda i: i | {"x": i["x"] * 0}},
        both_sides=True,
    ),
)
