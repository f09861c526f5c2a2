"""Models of pictures: any size, features and classifiers as timm has them, stages, memory plans, digits are learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import VisionCase, make_model, models, parametrize
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.bench.context_parallel import pretended
from zoo.errors import UsageError
from zoo.layers import BidirectionalAttention, VisionModel
from zoo.layers.memory import MemoryPlan
from zoo.layers.patches import Positions
from zoo.ops import shard
from zoo.train.optim import set_lr

EVERY = parametrize("case", models(VisionCase))
TINY = {"d_model": 16, "n_layers": 3, "n_heads": 2, "image_size": 8, "patch_size": 2, "channels": 1, "n_classes": 4}


def vit(**fields: Any) -> Any:
    torch.manual_seed(0)
    return zoo.create_model("vit", **(TINY | fields)).double().eval()


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@EVERY
@torch.no_grad()
def test_any_size_that_the_patches_divide(case: str) -> None:
    model = make_model(case)
    assert isinstance(model, VisionModel)
    channels = model.config.channels
    for rows, columns in ((8, 8), (4, 12), (16, 8)):
        logits, state = model(torch.randn(2, channels, rows, columns))
        assert logits.shape == (2, 5)
        assert state is None
    with pytest.raises(ValueError, match=r"multiples of \d, patch_size times 2 .*; got 8 x 7, resize or pad it"):
        model(torch.randn(1, channels, 8, 7))
    with pytest.raises(ValueError, match=f"images must have {channels} channels; got 7"):
        model(torch.randn(1, 7, 8, 8))
    with pytest.raises(ValueError, match="images must be"):
        model(torch.randn(8, 8))
    with pytest.raises(ValueError, match="carries no state"):
        model(torch.randn(1, channels, 8, 8), ())


@EVERY
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(case: str) -> None:
    model = make_model(case).double().train()
    assert isinstance(model, VisionModel)
    images, grads = pictures(3, model.config.channels, 8, 8), []
    for plan in (MemoryPlan(), MemoryPlan(recompute="block"), MemoryPlan(recompute="mixer_saved", tile_mlp=2)):
        model.use_memory(plan)
        assert model.memory == plan
        model.zero_grad()
        model(images)[0].sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name  # softmax is blind to what all keys share
    for other in grads[1:]:
        assert_close(grads[0], other, rtol=1e-9, atol=1e-12)


@EVERY
def test_save_and_load(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    zoo.save(model, tmp_path / "checkpoint")
    loaded = zoo.load(tmp_path / "checkpoint")
    assert loaded.config == model.config
    images = model.example(2)
    assert torch.equal(loaded(**images)[0], model(**images)[0])


@EVERY
def test_the_loss_falls(case: str) -> None:
    torch.manual_seed(0)
    model = make_model(case).train()
    images, labels = model.example(8, seed=3)["images"], torch.arange(8) % 5
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = F.cross_entropy(model(images)[0], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_a_forward_pass_by_hand() -> None:
    model, images = vit(n_layers=1), pictures(2, 1, 8, 8)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(1, 3).flatten(2)  # (B, 16, 4)
    x = patches @ model.embedding.proj.weight.flatten(1).T + model.embedding.proj.bias
    x = torch.cat([model.class_token.expand(2, -1, -1), x], dim=1) + model.positions.weight
    (block,) = model.blocks
    assert isinstance(block.mixer, BidirectionalAttention)
    x = x + block.mixer(F.layer_norm(x, (16,), eps=1e-6))[0]
    x = x + block.feed_forward(F.layer_norm(x, (16,), eps=1e-6))
    assert_close(model(images)[0], model.head(F.layer_norm(x[:, 0], (16,), eps=1e-6)))


def test_positions_of_another_grid_are_interpolated() -> None:
    positions = Positions(4, 3, extra=1)
    x = torch.zeros(1, 17, 3)
    assert torch.equal(positions(x, (4, 4)), positions.weight)
    wide = positions(torch.zeros(1, 1 + 8 * 4, 3), (8, 4))
    assert torch.equal(wide[:, 0], positions.weight[:, 0])
    with torch.no_grad():
        positions.weight[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # a slope along columns
    slope = positions(torch.zeros(1, 1 + 4 * 8, 3), (4, 8))[0, 1:, 0].view(4, 8)
    assert (slope.diff(dim=1) > -1e-5).all()
    assert_close(slope, slope[:1].expand(4, 8))


def test_features_are_maps_of_the_chosen_blocks() -> None:
    model, images = vit(), pictures(2, 1, 8, 12)
    chosen = vit(features_only=True, out_indices=(0, -1))
    assert chosen.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    features, state = chosen(images)
    assert state is None
    assert [tuple(x.shape) for x in features.maps] == [(2, 16, 4, 6), (2, 16, 4, 6)]
    seen = []
    model.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out[0]))
    model(images)
    assert torch.equal(features.maps[0], seen[0][:, 1:].transpose(1, 2).unflatten(2, (4, 6)))
    for ours, want in zip(features.maps, model.intermediates(images, (0, 2)), strict=True):
        assert torch.equal(ours, want)
    assert chosen.head is None


def test_stages_halve_the_grid_and_double_the_width() -> None:
    model = vit(depths=(1, 2), pooling="mean", features_only=True)
    maps = model(pictures(2, 1, 8, 16))[0].maps
    assert [tuple(x.shape) for x in maps] == [(2, 16, 4, 8), (2, 32, 2, 4)]
    assert model.num_features == 32


def test_down_sampling_joins_neighbours() -> None:
    torch.manual_seed(0)
    model = vit(depths=(1, 2), pooling="mean")
    down, x = model.downsamples[0], pictures(1, 16, 16)
    moved = x.clone()
    moved[:, [0, 1, 4, 5]] += torch.randn(16, dtype=torch.float64)
    changed = (down(x, (4, 4))[0] != down(moved, (4, 4))[0]).any(dim=-1)
    assert changed.tolist() == [[True, False, False, False]]


def test_a_fresh_classifier() -> None:
    model, images = vit(), pictures(2, 1, 8, 8)
    model.reset_classifier(7)
    assert model.config.n_classes == 7
    assert model(images)[0].shape == (2, 7)
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(0)
    headless = vit(n_classes=0)
    headless.load_state_dict(model.state_dict())
    assert torch.equal(model(images)[0], headless(images)[0])
    assert model(images)[0].shape == (2, 16)
    with pytest.raises(ValueError, match="features_only has no classifier"):
        vit(features_only=True).reset_classifier(3)


def test_stochastic_depth_grows_with_the_block() -> None:
    model = vit(drop_path=0.4, n_layers=3)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize(("fields", "words"), [
    ({"image_size": 9}, "image_size must be a multiple of 2, patch_size times 2 .*; got 9"),
    ({"depths": (1, 2)}, "pooling='token' is for one stage"),
    ({"depths": (1, 1), "pooling": "mean"}, "n_layers must be the sum of depths = 2"),
    ({"out_indices": (1,)}, "choose maps of features; set features_only=true"),
    ({"out_indices": (3,), "features_only": True}, r"out_indices must be in \[-3, 3\); got 3"),
    ({"depths": (1, 2), "pooling": "mean", "pattern": "hydra"}, "a pattern makes mixers of one width"),
    ({"pattern": "mamba"}, "a token in front of the patches sees none of them through causal mixers; use"),
])  # fmt: skip
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        vit(**fields)


def test_it_is_not_cut_across_ranks() -> None:
    with pretended(2), shard.use(shard.SequenceShard()), pytest.raises(ValueError, match="A model of pictures"):
        vit()(pictures(1, 1, 8, 8))


def test_digits_are_learnt_as_pictures() -> None:
    """Scikit-learn's digits, the last 360 held out; chance is 0.1."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    torch.manual_seed(0)
    model = zoo.create_model("vit", d_model=32, n_layers=2, init_std=0.15)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(120):
        set_lr(optimiser, 5e-3 * min(1, (step + 1) / 10) * (1 - step / 120))
        rows = torch.randint(len(images) - 360, (64,), generator=draw)
        loss = F.cross_entropy(model(images[rows])[0], labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = (model.eval()(images[-360:])[0].argmax(dim=1) == labels[-360:]).float().mean().item()
    assert right > 0.75, right
