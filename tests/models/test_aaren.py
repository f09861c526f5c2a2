"""Aaren as a model: counts, an oracle that shares no code with it, and what it can and cannot learn."""

import importlib.util
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.layers import MLP, Aaren, Block


@pytest.mark.parametrize("d", [512, 48, 8])
def test_a_layer_has_one_query_token_more_than_a_transformers(d: int) -> None:
    """3,152,896 against 3,152,384 at the paper's width."""
    theirs = nn.TransformerEncoderLayer(d, 4, 4 * d, activation="gelu", norm_first=True)
    ours = Block(d, Aaren(d), MLP(d), norm=nn.LayerNorm)
    count, other = (sum(p.numel() for p in layer.parameters()) for layer in (ours, theirs))
    assert count == other + d == 12 * d * d + 14 * d
    assert d != 512 or (count, other) == (3_152_896, 3_152_384)


def test_parameters_of_random_configurations() -> None:
    for d, layers, vocabulary in ((16, 3, 11), (64, 1, 257)):
        model = zoo.create_model("aaren", d_model=d, n_layers=layers, vocab_size=vocabulary, hidden_size=4 * d)
        per_layer = 4 * d * d + 4 * d + d + 8 * d * d + 5 * d + 4 * d
        assert sum(p.numel() for p in model.parameters()) == 2 * vocabulary * d + layers * per_layer + 2 * d


def test_a_layer_equals_torchs_attention_with_the_query_token_at_every_place() -> None:
    """`nn.MultiheadAttention` with the same weights, asked T times by one token, under a causal mask."""
    torch.manual_seed(0)
    d, heads, length = 24, 3, 70
    ours, theirs = Aaren(d, n_heads=heads, q_init_std=1.0).double(), nn.MultiheadAttention(d, heads).double()
    assert ours.q_proj is not None
    for proj in (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj):
        nn.init.normal_(proj.bias)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        theirs.out_proj.bias.copy_(ours.o_proj.bias)
    x = torch.randn(length, 2, d, dtype=torch.float64)  # time first, as theirs
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    want, _ = theirs(ours.query.expand(length, 2, d), x, x, attn_mask=mask, need_weights=False)
    assert_close(ours(x.transpose(0, 1))[0], want.transpose(0, 1), rtol=0, atol=1e-12)


def test_without_positions_the_order_of_the_past_is_lost() -> None:
    """What the layer cannot do: any order of the same tokens leaves the same state; a convolution before it sees it."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    order = torch.tensor([5, 2, 9, 0, 7, 1, 3, 11, 4, 6, 8, 10])
    for conv_size, same in ((None, True), (3, False)):
        layer = Aaren(16, q_init_std=1.0, conv_size=conv_size).double()
        averages = [layer(seen)[1].sums.output()[0] for seen in (x, x[:, order])]
        difference = (averages[0] - averages[1]).abs().max().item()
        assert (difference < 1e-14) == same, difference
        assert same or difference > 1e-3


def test_it_learns_the_mean_of_flagged_values() -> None:
    """The running-mean task, what the layer is for; a layer that sees the newest token alone stays far behind."""
    path = Path(__file__).parents[2] / "benchmarks" / "running_mean.py"
    spec = importlib.util.spec_from_file_location("running_mean", path)
    assert spec is not None
    assert spec.loader is not None
    running_mean = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(running_mean)
    errors = running_mean.train("aaren(n_heads=2)", steps=300)
    assert statistics.fmean(errors[-20:]) < 0.02
    assert statistics.fmean(errors[:5]) > 0.2
    assert statistics.fmean(running_mean.train("aaren(n_heads=2)", steps=300, alone=True)[-20:]) > 0.2
