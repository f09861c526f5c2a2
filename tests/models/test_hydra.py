"""Hydra as a model of the registry: published counts, checkpoints, decoding, its place among the others."""

import math
from pathlib import Path

import pytest
import torch

import zoo
from zoo.decoding import generate
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.registry import list_models, model_info

SMALL = {"d_model": 32, "n_layers": 2, "vocab_size": 50, "d_state": 8, "head_dim": 16}


@pytest.mark.parametrize("size", ["ablation", "base"])
def test_the_published_mixer_is_of_one_size(size: str) -> None:
    with torch.device("meta"):
        model = zoo.create_model("hydra", size=size)
    assert sum(p.numel() for p in model.blocks[0].mixer.parameters()) == 3_825_224


@pytest.mark.parametrize("fields", [{}, {"n_classes": 4, "pooling": "mean"}, {"prenorm": True}], ids=str)
def test_save_and_load(fields: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = zoo.create_model("hydra", **SMALL, **fields).eval(), torch.arange(18).view(2, 9)
    zoo.save(model, tmp_path / "checkpoint")
    loaded = zoo.load(tmp_path / "checkpoint")
    assert loaded.config == model.config
    assert torch.equal(loaded(x)[0], model(x)[0])
    if not fields:
        assert loaded.lm_head.decoder.weight is loaded.embeddings.word.weight


def test_hidden_tokens_are_learnt_from_both_sides() -> None:
    """A token that is hidden equals the one after it: only what comes later tells."""
    torch.manual_seed(0)
    model = zoo.create_model("hydra", **SMALL, dropout=0.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(140):
        x = torch.randint(40, (16, 12), generator=draw)
        targets = torch.full_like(x, -100)
        targets[:, 5] = x[:, 6]
        x[:, 5] = 49
        loss = model.head_loss(model.encode(x)[0], targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * math.log(40), losses  # who does not see it stays at log(40)


def test_it_continues_no_text() -> None:
    with pytest.raises(
        UserError, match="continued by a causal model, and hydra sees both sides of every token; zoo ev"
    ):
        next(generate(zoo.create_model("hydra", **SMALL), [1], max_tokens=1))


def test_tags_say_who_is_bidirectional() -> None:
    assert "hydra" in list_models(tags={"bidirectional"})
    for name in list_models(tags={"causal"}):
        assert "bidirectional" not in model_info(name).tags
    assert SequenceModel.causal
    assert not zoo.create_model("hydra", **SMALL).causal


def test_a_causal_models_pattern_refuses_it() -> None:
    with pytest.raises(UserError, match=r"model 'gla': the mixers of a causal model must not see the future, and Hyd"):
        zoo.create_model("gla", d_model=64, n_layers=2, pattern="gla, hydra(head_dim=32)")
