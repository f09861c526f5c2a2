"""The read from a memory bank against torch's attention."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.ops import memory_bank


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_it_is_one_head_of_attention_to_the_bank(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64).requires_grad_()
    bank = torch.randn(11, 16, generator=generator, dtype=torch.float64).requires_grad_()
    keys = bank.expand(2, 1, 11, 16)
    want = F.scaled_dot_product_attention(x[:, None], keys, keys, scale=scale)[:, 0]
    ours = memory_bank(x, bank, scale=scale)
    assert_close(ours, want, rtol=0, atol=1e-12)
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, (x, bank), upstream) for y in (ours, want)), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_bank: bank must have at least one vector; got M = 0"):
        memory_bank(torch.ones(1, 3, 4), torch.ones(0, 4))
