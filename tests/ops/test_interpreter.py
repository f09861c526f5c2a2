"""What Triton's interpreter cannot compute is refused."""

import pytest
import torch

from zoo.ops.core import dispatch
from zoo.ops.core.spec import OperatorSpec, convert, parity, red
from zoo.ops.core.table import OPERATORS

KERNELS = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if "triton" in spec.forms]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not dispatch.INTERPRETED, reason="kernels are compiled here, not interpreted"),
]


@pytest.mark.parametrize("spec", KERNELS)
def test_bfloat16_is_refused_under_the_interpreter(spec: OperatorSpec) -> None:
    with pytest.raises(ValueError, match=r": Triton's interpreter .* no bfloat16.*; got bfloat16.*, use float16 or"):
        spec.run(convert(spec.inputs(1, 5), torch.bfloat16), backend="triton")


@pytest.mark.parametrize("spec", KERNELS)
def test_float16_is_right_under_the_interpreter(spec: OperatorSpec) -> None:
    assert not red(parity(spec, spec.inputs(1, 5), backend="triton", dtype=torch.float16), torch.float16)
