"""Tables that calls share: made once, and as good for training when decoding made them."""

import pytest
import torch

from zoo.ops.core.cached import cached_tensors
from zoo.ops.core.spec import OperatorSpec, relative_error
from zoo.ops.core.table import OPERATORS

PACKED = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.packed]


def test_results_are_kept_by_their_arguments() -> None:
    made: list[tuple[int, str]] = []

    @cached_tensors(2)
    def table(n: int, *, name: str = "") -> torch.Tensor:
        made.append((n, name))
        return torch.arange(n)

    assert table(3) is table(3)
    assert table(3, name="x") is not table(3)
    assert made == [(3, ""), (3, "x")]


@pytest.mark.filterwarnings("ignore:newton_scan")  # random weights: it says that it walks
@pytest.mark.parametrize("spec", PACKED)
def test_what_inference_mode_made_serves_training(spec: OperatorSpec) -> None:
    """Documents of the same lengths are read by a decoder first, and trained on after that."""
    bounds = torch.tensor([0, 1, 4, 15, 21, 37])  # lengths that no other test has
    inputs = spec.inputs(1, 37, documents=5)
    with torch.inference_mode():
        want = spec.run(inputs, cu_seqlens=bounds)
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    got = spec.run(leaves, cu_seqlens=bounds)
    sum(x.sum() for x in got if x.requires_grad).backward()  # type: ignore[union-attr]
    assert relative_error(got[0].detach(), want[0]) < 1e-9
