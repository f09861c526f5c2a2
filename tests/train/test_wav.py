"""WAV files: what is read back, what is cut off, what is refused, and that a failure leaves the old file."""

import os
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.train import wav
from zoo.train.wav import write_wav

EDGES = torch.tensor([0.0, 1.0, -1.0, 0.5, 1 / 32767, -0.4 / 32767, 0.6 / 32767])


def read(path: Path) -> tuple[np.ndarray, int]:
    """(channels, T) int16 and the rate."""
    with wave.open(str(path), "rb") as file:
        assert (file.getsampwidth(), file.getcomptype()) == (2, "NONE")
        frames = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return frames.reshape(-1, file.getnchannels()).T, file.getframerate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_come_back_as_the_nearest_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "made" / "a.wav"
    write_wav(path, EDGES.to(dtype).requires_grad_(), 22_050)
    integers, rate = read(path)
    assert rate == 22_050
    if dtype != torch.bfloat16:
        assert integers.tolist() == [[0, 32767, -32767, 16384, 1, 0, 1]]
    draw = torch.Generator().manual_seed(0)
    sound = (torch.rand(1, 5000, generator=draw) * 2 - 1).to(dtype)
    write_wav(path, sound, 8000)
    assert np.abs(read(path)[0] / 32767 - sound.double().numpy()).max() <= 0.5 / 32767 + 1e-9
    assert [each.name for each in path.parent.iterdir()] == ["a.wav"]


def test_stereo_has_the_left_channel_first(tmp_path: Path) -> None:
    left, right = torch.linspace(-1, 1, 9), torch.zeros(9)
    write_wav(tmp_path / "a.wav", torch.stack([left, right]), 44_100)
    integers, _ = read(tmp_path / "a.wav")
    assert integers[0].tolist() == (left * 32767).round().int().tolist()
    assert not integers[1].any()


def test_what_is_too_loud_is_cut_off_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^a.wav: 2 of 4 samples lie outside of \[-1, 1\] .* largest is 2.5; scale"):
        write_wav(tmp_path / "a.wav", torch.tensor([0.25, 1.5, -2.5, -1.0]), 8000)
    assert read(tmp_path / "a.wav")[0].tolist() == [[8192, 32767, -32767, -32767]]


@pytest.mark.parametrize(
    ("samples", "rate", "rule"),
    [
        (torch.tensor([0.0, torch.nan, torch.inf]), 8000, "takes finite samples, and 2 of 3 are not"),
        (torch.zeros(3, 5), 8000, r"\(T,\), \(1, T\) or \(2, T\); got \(3, 5\)"),
        (torch.zeros(2, 2, 2), 8000, r"got \(2, 2, 2\)"),
        (torch.zeros(5, dtype=torch.int16), 8000, "got .* of torch.int16"),
        (torch.zeros(5), 0, "needs a rate of 1 to 2,147,483,647 samples a second; got 0"),
        (torch.zeros(2, 5), 2**30, "needs a rate of 1 to 1,073,741,823"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, samples: Tensor, rate: int, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        write_wav(tmp_path / "a.wav", samples, rate)
    assert not list(tmp_path.iterdir())


def test_sounds_larger_than_a_file_can_say_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wav, "LARGEST", 20_000)
    with pytest.raises(UserError, match="can hold 4 GiB, and 10,000 samples are more"):
        write_wav(tmp_path / "a.wav", torch.zeros(10_000), 8000)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, EDGES, 8000)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_wav(path, torch.zeros(100), 8000)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.wav"]
