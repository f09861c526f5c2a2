"""What the shared harness does not see of the short convolution."""

import pytest
import torch

from zoo.ops import causal_conv1d


@pytest.mark.parametrize("backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_state_holds_no_more_than_itself(backend: str, packed: bool) -> None:
    """A view of the input would keep a whole stretch in memory as long as its state lives."""
    cuts = torch.tensor([0, 20, 50]) if packed else None
    _, tail = causal_conv1d(torch.randn(1, 50, 8), torch.randn(8, 4), cu_seqlens=cuts, backend=backend)
    assert tail.untyped_storage().nbytes() < 2 * tail.numel() * tail.element_size()
