"""The estimate of a step for encoders and models of pictures, beside what is measured; and its refusals."""

from typing import Any

import pytest
import torch
from test_memory import live
from torch import Tensor, nn

import zoo
from zoo.layers import Mixer, VisionConfig, VisionModel
from zoo.layers.memory import MemoryPlan
from zoo.layers.model import as_model
from zoo.train.memory.estimate import estimate

PLANS = [MemoryPlan(), MemoryPlan(recompute="block"), MemoryPlan(recompute="mixer_saved")]
MODELS: dict[str, dict[str, Any]] = {
    "hydra": {"d_model": 64, "n_layers": 4, "vocab_size": 257, "dropout": 0.0},
    "hydra, classes": {"d_model": 64, "n_layers": 4, "vocab_size": 257, "dropout": 0.0, "n_classes": 3},
    "vit": {"d_model": 64, "n_layers": 4, "image_size": 32, "patch_size": 2, "n_heads": 2},
}


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_the_estimate_is_what_is_measured(case: str, plan: MemoryPlan) -> None:
    def build(device: str) -> Any:
        with torch.device(device):
            return as_model(zoo.create_model(case.partition(",")[0], **MODELS[case]))

    model = build("cpu")
    batch = model.example(4, 500)
    B, T = model.block_shape(batch)
    expected = estimate(build("meta"), B, T, plan)
    model.use_memory(plan)

    def step() -> None:
        if case == "hydra":
            model.head_loss(model.encode(**batch)[0], batch["tokens"], reduction="sum").backward()
        else:
            model(**batch)[0].sum().backward()

    static = 12 * sum(p.numel() for p in model.parameters())
    assert expected.peak == pytest.approx(static + live(step), rel=0.1)
    assert expected.peak > 1.5 * static  # activations are what was estimated


class OverGrid(Mixer):
    """A 3 x 3 convolution over patches, which needs their rows and columns."""

    causal, takes = False, ("grid",)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)

    def forward(self, x: Tensor, state: Any = None, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, None]:
        assert grid is not None
        return self.conv(x.mT.unflatten(2, grid)).flatten(2).mT.contiguous(), None

    def init_state(self, batch: int) -> None:
        return None


def test_a_mixer_over_the_grid_of_a_picture_is_estimated() -> None:
    config = VisionConfig(
        d_model=64, n_layers=4, image_size=32, patch_size=2, n_classes=10, pooling="mean", positions="none"
    )

    def build(device: str) -> VisionModel:
        with torch.device(device):
            return VisionModel(config, lambda i: OverGrid(64))

    model = build("cpu")
    batch = model.example(4)
    expected = estimate(build("meta"), *model.block_shape(batch))
    static = 12 * sum(p.numel() for p in model.parameters())
    measured = live(lambda: model(**batch)[0].sum().backward())
    assert expected.peak == pytest.approx(static + measured, rel=0.1)


def test_what_is_not_estimated_says_what_to_do() -> None:
    for model in (
        zoo.create_model("encoder_decoder"),
        zoo.create_model("vit", depths=(2, 2), pooling="mean"),
    ):
        with pytest.raises(ValueError, match=r"or a VisionModel of one stage; got .*, say memory.recompute=block"):
            estimate(model, 1, 16)
