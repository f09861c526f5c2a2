"""GAM against its paper's equations in plain torch, and how far back its outputs see."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.errors import UserError
from zoo.layers import GAM
from zoo.layers.gam_block import GAMBlock


def test_parameters_of_random_configurations() -> None:
    for V, block, D, L, k, M in ((50, 32, 24, 3, 3, 10), (11, 7, 8, 1, 5, 16)):
        model = zoo.create_model(
            "gam", d_model=D, n_layers=L, vocab_size=V, max_length=block, conv_size=k, n_slots=M, hidden_size=4 * D
        )
        per_layer = D * k + D + M * D + 2 * D * D + 2 * D + 8 * D * D + 5 * D + 4 * D
        assert sum(p.numel() for p in model.parameters()) == V * D + block * D + L * per_layer + 2 * D


def published(weights: dict[str, Tensor], tokens: Tensor, n_layers: int) -> Tensor:
    """Logits by the equations of the paper, each block written out."""
    positions, k = weights["blocks.0.mixer.table.weight"], weights["blocks.1.mixer.conv.weight"].shape[1]
    x = weights["embedding.weight"][tokens] + positions[: tokens.shape[1]]
    for i in range(1, n_layers + 1):
        at: dict[str, Tensor] = {
            name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")
        }
        D = x.shape[-1]
        n = F.layer_norm(x, (D,), at["mixer_norm.weight"], at["mixer_norm.bias"], 1e-5)
        padded = F.pad(n.mT, (k - 1, 0))
        local = F.conv1d(padded, at["mixer.conv.weight"].unsqueeze(1), at["mixer.conv.bias"], groups=D).mT
        bank = at["mixer.bank"]
        read = F.scaled_dot_product_attention(n, bank[None], bank[None], scale=1.0)
        gates = F.linear(n, at["mixer.gate_proj.weight"], at["mixer.gate_proj.bias"]).sigmoid()
        x = x + gates[..., :D] * local + gates[..., D:] * read
        n = F.layer_norm(x, (D,), at["feed_forward_norm.weight"], at["feed_forward_norm.bias"], 1e-5)
        h = F.gelu(F.linear(n, at["feed_forward.up_proj.weight"], at["feed_forward.up_proj.bias"]))
        x = x + F.linear(h, at["feed_forward.down_proj.weight"], at["feed_forward.down_proj.bias"])
    x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-5)
    return x @ weights["embedding.weight"].T


def small(**fields: Any) -> Any:
    """A model of two layers in float64, far from its start."""
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_slots": 10, "hidden_size": 40, "vocab_size": 30, "max_length": 64}
    model = zoo.create_model("gam", **(sizes | fields)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.eval()


def test_the_model_is_that_of_the_papers_equations() -> None:
    model = small()
    tokens = torch.randint(30, (2, 41), generator=torch.Generator().manual_seed(1))
    want = published(dict(model.state_dict()), tokens, n_layers=2)
    assert_close(model(tokens)[0], want, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("n_layers", "conv_size"), [(2, 3), (3, 4), (6, 3), (1, 1)])
def test_an_output_sees_so_many_tokens_and_no_more(n_layers: int, conv_size: int) -> None:
    """1 + layers * (taps - 1) of them, 13 for the published model: non-zero gradients inside, exact zeros outside."""
    model, length, at = small(n_layers=n_layers, conv_size=conv_size), 40, 33
    x = torch.randn(1, length, 24, dtype=torch.float64, requires_grad=True)
    y, _ = model.blocks(x)
    (dx,) = torch.autograd.grad(y[:, at].square().sum(), x)
    seen = dx[0].norm(dim=-1) > 0
    reach = n_layers * (conv_size - 1)
    expected = torch.tensor([at - reach <= s <= at for s in range(length)])
    assert torch.equal(seen, expected)


def test_nothing_moves_between_positions_in_the_bank() -> None:
    """The bank's path under a permutation of time is permuted; with the convolution's path it is not."""
    torch.manual_seed(0)
    layer = GAM(16, n_slots=12).double()
    x, order = torch.randn(2, 20, 16, dtype=torch.float64), torch.randperm(20)
    assert (layer(x[:, order])[0] - layer(x)[0][:, order]).abs().max() > 0.01
    nn.init.zeros_(layer.conv.weight)
    assert_close(layer(x[:, order])[0], layer(x)[0][:, order], rtol=0, atol=1e-15)


def test_a_hybrid_sees_the_whole_past() -> None:
    torch.manual_seed(0)
    model = zoo.create_model(
        "gam_hybrid", d_model=24, n_layers=2, n_heads=2, hidden_size=40, vocab_size=30
    ).double()  # fmt: skip
    x = torch.randn(1, 40, 24, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(model.blocks(x)[0][:, 33].square().sum(), x)
    assert torch.equal(dx[0].norm(dim=-1) > 0, torch.arange(40) <= 33)


def test_steps_shorter_than_the_taps_equal_one_pass() -> None:
    model = small(conv_size=5)
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))
    whole, parts, state = model(tokens)[0], [], None
    for piece in tokens.split([2, 1, 3, 1, 2], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_sequences_beyond_the_learnt_positions_are_refused() -> None:
    model = small(max_length=16)
    tokens = torch.zeros(1, 12, dtype=torch.long)
    _, state = model(tokens)
    model(tokens[:, :4], state)
    with pytest.raises(UserError, match=r"at most 16 tokens a sequence; got 17, shorten .* model.max_length"):
        model(tokens[:, :5], state)
    with pytest.raises(UserError, match="got 20"):
        model(torch.zeros(1, 20, dtype=torch.long))
    packed = torch.zeros(1, 20, dtype=torch.long)  # of two documents that are short enough
    model(packed, cu_seqlens=torch.tensor([0, 16, 20]))
    with pytest.raises(UserError, match="got 17"):
        model(packed, cu_seqlens=torch.tensor([0, 17, 20]))
    assert small(max_length=None)(torch.zeros(1, 20, dtype=torch.long))[0].shape == (1, 20, 30)


def test_places_in_packed_documents_go_on_from_their_states() -> None:
    model = small()
    tokens = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(1))
    whole, _ = model(tokens)
    _, state = model(tokens[:, :11])
    rest = tokens[:, 11:].reshape(1, -1)
    logits, _ = model(rest, state, cu_seqlens=torch.tensor([0, 9, 18]))
    assert_close(logits.view(2, 9, -1), whole[:, 11:], rtol=0, atol=1e-12)


def test_dropout_acts_behind_the_feed_forward_and_not_behind_the_mixer() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    mixing = GAMBlock(16, GAM(16), hidden_size=0, dropout=0.5)
    assert torch.equal(mixing.train()(x)[0], mixing.eval()(x)[0])
    both = GAMBlock(16, GAM(16), dropout=0.5)
    assert not torch.equal(both.train()(x)[0], both.eval()(x)[0])
    model = zoo.create_model("gam", d_model=16, n_layers=1, vocab_size=30, dropout=0.5).train()
    embedded = model.embedding(torch.zeros(1, 9, dtype=torch.long))
    first, _ = model.blocks[0](embedded)
    dropped = first == 0
    assert 0.3 < dropped.float().mean() < 0.7
    model.eval()
    assert_close(first[~dropped], 2 * model.blocks[0](embedded)[0][~dropped])


@pytest.mark.parametrize("init", ["official", "zoo"])
def test_starts(init: str) -> None:
    """The official one leaves positions forty times as large as tokens; the other one has both alike."""
    torch.manual_seed(0)
    model = zoo.create_model("gam", size="22.6m", n_layers=1, vocab_size=1000, init=init)
    tokens, places = model.embedding.weight.std().item(), model.blocks[0].mixer.table.weight.std().item()
    bank = model.blocks[1].mixer.bank
    assert bank.abs().max() <= (6 / 1024) ** 0.5
    assert bank.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)
    if init == "official":
        assert tokens == pytest.approx((1 / 512) ** 0.5 / 3**0.5, rel=0.01)
        assert places == pytest.approx(1, rel=0.01)
        assert model.blocks[1].mixer.conv.weight.abs().max() <= 3**-0.5
    else:
        assert tokens == pytest.approx(0.02, rel=0.01)
        assert places == pytest.approx(0.02, rel=0.01)


def test_the_loss_of_the_published_model_at_its_start() -> None:
    """9.36 on random tokens, where a uniform guess has ln 10000 = 9.21."""
    torch.manual_seed(0)
    model = zoo.create_model("gam", size="22.6m").eval()
    tokens = torch.randint(10_000, (2, 257), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(9.36, abs=0.05)
