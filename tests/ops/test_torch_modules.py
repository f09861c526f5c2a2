"""Modules of torch's own that look along time are refused where time is cut."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from zoo.errors import UserError
from zoo.ops import shard
from zoo.ops.shard.torch_modules import looks_along_time
from zoo.train.strategies.kinds import refuse_uncuttable

ALONG_TIME = [
    nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (3, 1)),
    nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 2, stride=2, dilation=2),
    nn.Conv3d(4, 4, (2, 1, 1)), nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
    nn.ConvTranspose2d(4, 4, 1, stride=2), nn.MaxPool1d(3, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, stride=2),
    nn.AvgPool3d(2, 1), nn.LPPool1d(2, 3, stride=1), nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool2d(1), nn.LSTM(4, 4),
    nn.GRU(4, 4), nn.RNN(4, 4), nn.MultiheadAttention(4, 1), nn.TransformerEncoderLayer(4, 1),
    nn.Transformer(4, 2, 1, 1, batch_first=True), nn.InstanceNorm1d(4), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.ReflectionPad1d(1), nn.ZeroPad2d((0, 0, 1, 0)),
    nn.Unfold(2),
]  # fmt: skip
TOKEN_WISE = [
    nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, padding="same"), nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
    nn.Conv2d(3, 4, 16, stride=16), nn.ConvTranspose1d(4, 4, 2, stride=2), nn.MaxPool2d(2), nn.AvgPool1d(2),
    nn.ConvTranspose2d(4, 4, 1, stride=2, output_padding=1), nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4),
    nn.GroupNorm(1, 4), nn.LSTMCell(4, 4), nn.Upsample(scale_factor=2), nn.ZeroPad2d((1, 1, 0, 0)), nn.Dropout(0.1),
]  # fmt: skip


@pytest.mark.parametrize("module", ALONG_TIME, ids=repr)
def test_what_sees_other_tokens_is_refused_before_training(module: nn.Module) -> None:
    assert looks_along_time(module)
    with pytest.raises(UserError, match=rf"^0 \({type(module).__name__}\) goes along time and cannot go on"):
        refuse_uncuttable(nn.Sequential(module), "contiguous")


@pytest.mark.parametrize("module", TOKEN_WISE, ids=repr)
def test_what_sees_one_token_or_one_window_may_be_cut(module: nn.Module) -> None:
    assert not looks_along_time(module)
    refuse_uncuttable(nn.Sequential(module), "contiguous")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[shard.SequenceShard]:
    """A place of two ranks without a second process: what is tested here sends nothing."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        place = shard.SequenceShard()
        object.__setattr__(place, "size", 2)
        yield place
    finally:
        dist.destroy_process_group()


x = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("module", "inputs", "why"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), x, "Conv2d goes along time and cannot go on from another rank's stretch"),
        (nn.MaxPool2d(3, 1), x, "MaxPool2d goes along time"),
        (nn.ConvTranspose2d(4, 4, 3), x, "ConvTranspose2d goes along time"),
        (nn.LSTM(6, 4), x[0], "LSTM goes along time"),
        (nn.BatchNorm2d(4), x, "BatchNorm2d takes the statistics of its own stretch"),
        (nn.GroupNorm(1, 4), x, "GroupNorm takes the statistics of its own stretch"),
        (nn.Conv2d(4, 4, 4, stride=4), x, "a rank's stretch must be a multiple of 4; got 6, cut at multiples of it"),
    ],
    ids=repr,
)
def test_a_call_under_a_plain_shard_is_refused(
    cut: shard.SequenceShard, module: nn.Module, inputs: torch.Tensor, why: str
) -> None:
    model = nn.Sequential(nn.Identity(), module)
    model(inputs)
    with shard.use(cut):
        with pytest.raises(ValueError, match=why):
            model(inputs)
        with shard.use(None):
            model(inputs)
    model(inputs)
    assert not nn.modules.module._global_forward_pre_hooks  # nothing is left that slows modules


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Conv2d(4, 4, 2, stride=2), x),
        (nn.Conv2d(4, 4, (1, 3)), x),
        (nn.BatchNorm2d(4).eval(), x),
        (nn.GroupNorm(1, 4), x[0, :, :, 0].T),
        (nn.Linear(6, 6), x),
    ],
    ids=repr,
)
def test_a_call_that_stays_within_its_tokens_runs(
    cut: shard.SequenceShard, module: nn.Module, inputs: torch.Tensor
) -> None:
    with shard.use(cut):
        module(inputs)
