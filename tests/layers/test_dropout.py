"""Dropout as a layer: when it acts, what seeds it, and that neither recomputation nor tiles change a mask."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.layers import ChannelDropout, Dropout, SequenceConfig
from zoo.layers.block import Block
from zoo.layers.dropout import set_streams
from zoo.layers.memory import MemoryPlan

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden_size": 24, "vocab_size": 11, "init_std": 0.3}


@pytest.mark.parametrize("layer", [Dropout, ChannelDropout])
def test_evaluation_and_zero_are_the_identity(layer: type[Dropout]) -> None:
    x = torch.randn(2, 5, 8)
    before = torch.get_rng_state()
    assert layer(0.5).eval()(x) is x
    assert layer(0.0)(x) is x
    assert torch.equal(before, torch.get_rng_state())  # nothing was drawn either
    assert not torch.equal(layer(0.5)(x), x)


@pytest.mark.parametrize("layer", [Dropout, ChannelDropout])
@pytest.mark.parametrize("p", [1.0, -0.1])
def test_a_rate_out_of_range_is_refused(layer: type[Dropout], p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\)[;,] got {p}"):
        layer(p)
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\)[;,] got {p}"):
        SequenceConfig(dropout=p)


def test_torchs_seed_decides_and_every_call_draws_anew() -> None:
    drop, x = Dropout(0.5), torch.ones(2, 9, 16)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    set_streams(torch.nn.Sequential(drop), 1)
    assert not torch.equal(drop(x), first)


def test_vectors_without_time() -> None:
    torch.manual_seed(0)
    y = Dropout(0.5)(torch.ones(40, 50))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in y.tolist()}) == 40
    assert 0.45 < float((y == 0).float().mean()) < 0.55


def test_recomputation_draws_the_same_mask() -> None:
    drop = Dropout(0.5)
    x = torch.randn(2, 9, 16, requires_grad=True)
    y = checkpoint(lambda x: (drop(x) * x).tanh(), x, use_reentrant=False)
    drop(x)  # the generator goes on
    (d,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    expected = 4 * x * (1 - y.square()) * kept  # of tanh(2 x^2)
    assert torch.allclose(d, expected, atol=1e-5)


PLANS: tuple[dict[str, Any], ...] = (
    {"recompute": "block"}, {"recompute": "mixer_saved"}, {"tile_mlp": 5}, {"recompute": "block", "tile_mlp": 3},
    {"recompute": "mixer_saved", "tile_mlp": 4}, {"recompute": "mixer_saved", "offload": "alpha:0.4"},
    {"recompute": "mixer_saved", "offload": "alpha:0.6", "tile_mlp": 4},
)  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_memory_plan_changes_a_mask(plan: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("gla", **SMALL, dropout=0.3).double()
    other = copy.deepcopy(model)
    other.use_memory(MemoryPlan(**plan))
    tokens = torch.randint(11, (2, 13))
    found = []
    for net in (model, other):
        torch.manual_seed(7)
        logits = net(tokens)[0]
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), list(net.parameters()))])
    for ours, want in zip(found[1], found[0], strict=True):
        assert torch.allclose(ours, want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0][0], model.eval()(tokens)[0])


def test_both_halves_drop_and_with_masks_of_their_own() -> None:
    """With halves that add ones, the block adds 0, 2 or 4 to its input under p = 1/2."""

    class Ones(torch.nn.Module):
        def forward(self, x: torch.Tensor, state: Any = None, *, cu_seqlens: Any = None) -> tuple[torch.Tensor, None]:
            return torch.ones_like(x), None

    class Feed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(x)

    torch.manual_seed(0)
    x = torch.zeros(2, 50, 40)
    for feed, values in ((Feed(), {0.0: 0.25, 2.0: 0.5, 4.0: 0.25}), (None, {0.0: 0.5, 2.0: 0.5})):
        y, _ = Block(40, Ones(), feed, dropout=0.5)(x)
        assert {value: pytest.approx(float((y == value).float().mean()), abs=0.05) for value in values} == values


def test_weights_and_numbers_are_those_of_a_model_without_it() -> None:
    torch.manual_seed(0)
    plain = zoo.create_model("gla", **SMALL)
    dropping = zoo.create_model("gla", **SMALL, dropout=0.3).eval()
    dropping.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (1, 7))
    assert torch.equal(plain(tokens)[0], dropping(tokens)[0])
    _, state = dropping(tokens[:, :3])
    assert torch.allclose(dropping(tokens[:, 3:], state)[0], plain(tokens)[0][:, 3:], atol=1e-5)


def test_an_encoder_drops_the_same_with_padding_on_either_side() -> None:
    """By row and position, whether the padding was taken out or not."""
    torch.manual_seed(0)
    fields = {"d_model": 16, "n_layers": 1, "vocab_size": 11, "d_state": 4, "head_dim": 8, "dropout": 0.3}
    model = zoo.create_model("hydra", **fields).double()
    tokens, mask = torch.randint(11, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    torch.manual_seed(1)
    whole, _ = model(tokens)
    torch.manual_seed(1)
    padded, _ = model(tokens, mask=mask)
    assert torch.allclose(padded[1], whole[1], rtol=1e-12, atol=1e-12)
