"""The two-sided convolution against torch's."""

import pytest
from torch.nn import functional as F

from zoo.ops import depthwise_conv1d
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS

SPEC = OPERATORS["depthwise_conv1d"]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("T", [1, 2, 5, 40])
def test_agrees_with_torchs_convolution(width: int, T: int) -> None:
    i = SPEC.inputs(2, T, {"D": 6, "W": width})
    padded = F.pad(i["x"].mT, ((width - 1) // 2, width // 2))  # as padding="same", which warns of even widths
    want = F.conv1d(padded, i["weight"].unsqueeze(1), i["bias"], groups=6).mT
    assert relative_error(depthwise_conv1d(**i), want) < 1e-12
    assert relative_error(depthwise_conv1d(**i, activation="silu"), F.silu(want)) < 1e-12
    assert relative_error(depthwise_conv1d(**i, activation="silu", backend="reference"), F.silu(want)) < 1e-12


def test_activations_are_checked() -> None:
    with pytest.raises(ValueError, match="activation must be None or 'silu'; got 'relu'"):
        depthwise_conv1d(**SPEC.inputs(1, 5), activation="relu")
