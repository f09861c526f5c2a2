"""Attention to another sequence and over both sides: against torch's own, any cut, lengths, refusals."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.layers import BidirectionalAttention, CrossAttention
from zoo.ops import shard

D, H = 16, 4


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cross() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention(D, n_heads=H, memory_size=10, bias=True).double()


def by_torch(layer: nn.Module, x: Tensor, memory: Tensor, hidden: Tensor | None = None) -> Tensor:
    """torch's own multi-head attention with the layer's matrices; `hidden` (B, S) marks rows that do not exist."""
    y, _ = F.multi_head_attention_forward(
        x.transpose(0, 1), memory.transpose(0, 1), memory.transpose(0, 1), D, H, None,
        torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]), None, None, False, 0.0,
        layer.o_proj.weight, layer.o_proj.bias, key_padding_mask=hidden, use_separate_proj_weight=True,
        q_proj_weight=layer.q_proj.weight, k_proj_weight=layer.k_proj.weight, v_proj_weight=layer.v_proj.weight,
    )  # fmt: skip
    return y.transpose(0, 1)


def test_cross_attention_is_torchs() -> None:
    layer, x, memory = cross(), random(3, 7, D), random(3, 5, 10, seed=2)
    assert_close(layer(x, memory=memory)[0], by_torch(layer, x, memory))
    lengths = torch.tensor([5, 1, 3])
    hidden = torch.arange(5) >= lengths[:, None]
    assert_close(layer(x, memory=memory, memory_lengths=lengths)[0], by_torch(layer, x, memory, hidden))


def test_rows_behind_the_lengths_are_never_seen() -> None:
    layer, x, memory, lengths = cross(), random(2, 4, D), random(2, 6, 10, seed=2), torch.tensor([2, 0])
    changed = memory.clone()
    changed[0, 2:], changed[1] = 1e6, -1e6
    y, _ = layer(x, memory=memory, memory_lengths=lengths)
    assert torch.equal(y, layer(x, memory=changed, memory_lengths=lengths)[0])
    assert_close(y[1], layer.o_proj.bias.expand_as(y[1]))  # nothing to look at


def test_any_cut_in_time_and_the_keys_are_made_once() -> None:
    layer, x, memory, lengths = cross(), random(2, 9, D), random(2, 5, 10, seed=2), torch.tensor([5, 2])
    whole, last = layer(x, memory=memory, memory_lengths=lengths)
    for cut in (0, 1, 4, 9):
        first, state = layer(x[:, :cut], layer.init_state(2), memory=memory, memory_lengths=lengths)
        second, end = layer(x[:, cut:], state)
        assert_close(torch.cat([first, second], dim=1), whole)
        assert end.k is state.k
    assert layer.state_bytes(2, 5) == sum(part.nbytes for part in last)
    assert layer.state_bytes(2, 0) == sum(part.nbytes for part in layer.init_state(2))


def test_gradients_reach_the_memory_through_the_state() -> None:
    layer, x, memory = cross(), random(2, 6, D), random(2, 5, 10, seed=2).requires_grad_()
    (whole,) = torch.autograd.grad(layer(x, memory=memory)[0].sin().sum(), memory)
    first, state = layer(x[:, :2], memory=memory)
    (cut,) = torch.autograd.grad(torch.cat([first, layer(x[:, 2:], state)[0]], dim=1).sin().sum(), memory)
    assert_close(cut, whole)


def test_cross_attention_refusals() -> None:
    layer, x = cross(), random(2, 3, D)
    with pytest.raises(ValueError, match="the first call needs a memory of 2 rows, the batch of its tokens; got none"):
        layer(x)
    with pytest.raises(ValueError, match="got one of 3, give Surroundings"):
        layer(x, memory=random(3, 5, 10))
    with pytest.raises(ValueError, match=r"memory_lengths must be \(2,\); got \(3,\)"):
        layer(x, memory=random(2, 5, 10), memory_lengths=torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="n_heads must divide d_model = 16; got 3 heads"):
        CrossAttention(D, n_heads=3)


def test_bidirectional_attention_is_torchs() -> None:
    torch.manual_seed(0)
    layer, x = BidirectionalAttention(D, n_heads=H, rope_base=None, bias=True).double(), random(2, 9, D)
    assert_close(layer(x)[0], by_torch(layer, x, x))


def test_rotary_positions_are_relative_and_those_of_each_document() -> None:
    torch.manual_seed(0)
    layer, x = BidirectionalAttention(D, n_heads=H).double(), random(1, 9, D)
    turned = layer(x.flip(1))[0].flip(1)
    assert not torch.allclose(layer(x)[0], turned)  # positions matter
    packed, _ = layer(torch.cat([x, x], dim=1), cu_seqlens=torch.tensor([0, 9, 18]))
    assert_close(packed[:, :9], packed[:, 9:])
    with pytest.raises(ValueError, match="sees both sides of every token and carries no state"):
        layer(x, ())
    assert shard.current() is None


@pytest.mark.parametrize(("options", "words"), [
    ({"n_heads": 3}, "n_heads must divide d_model = 16; got 3 heads"),
    ({"n_heads": 16}, "need an even d_model / n_heads; got 1"),
    ({"window": 0}, "window must be at least 1"),
])  # fmt: skip
def test_bidirectional_refusals(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BidirectionalAttention(D, **options)
