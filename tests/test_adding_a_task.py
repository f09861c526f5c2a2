"""docs/adding_a_task.md, followed to the letter: its blocks become new files, and its commands do what they say."""

import csv
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from followed_page import ROOT, House, new_files

PAGE = (ROOT / "docs" / "adding_a_task.md").read_text(encoding="utf-8")
FILES = new_files("adding_a_task.md")
TASK = "train/tasks/spectrogram.py"

HEAR = """
import sys, wave
import numpy as np
from zoo.train.data.synthetic.tones import HOP, LOWEST, RATE, Tones

with wave.open(sys.argv[1] + "/melody.wav", "rb") as file:
    sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
notes = Tones(batch_size=8).sources[1].batch(0, 0, 0, 1)["notes"][0].numpy()
borders = [0, *np.flatnonzero(np.diff(notes)) + 1, len(notes)]
for first, end in zip(borders, borders[1:]):
    part = sound[first * HOP : end * HOP]
    if notes[first] and end - first >= 3 and len(part) == (end - first) * HOP:
        loudest = np.abs(np.fft.rfft(part * np.hanning(len(part)))).argmax() * RATE / len(part)
        print(LOWEST * 2 ** ((notes[first] - 1) / 12), loudest)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A copy of the sources with the page's files and their indices."""
    house = House(tmp_path_factory.mktemp("house"))
    house.add(FILES)
    written = house.write_indices()
    assert "tone_encoder.json" in written
    assert "zoo.train.tasks.spectrogram.Spectrogram.json" in written
    return house


def zoo(house: House, *words: str) -> str:
    return house.python("-m", "zoo", *words)


@pytest.mark.everything
def test_the_page_adds_a_task_and_a_model_that_pass_every_proof(house: House) -> None:
    assert house.passes("-m", "", "-k", "tone_encoder", "tests/models") >= 4
    assert house.passes("tests/train/test_spectrogram.py", "tests/test_architecture.py") >= 4
    names = set(re.findall(r"^\| `([\w/]+\.py)` \|", PAGE, re.MULTILINE))
    assert names <= FILES.keys()


@pytest.mark.everything
def test_a_loss_that_counts_what_only_fills_up_is_seen(tmp_path: Path) -> None:
    """The negative control: a mistake that the page's own proofs must find."""
    wrong = FILES[TASK].replace("sequence_means(distance, sounds & scored)", "sequence_means(distance, sounds)")
    assert wrong != FILES[TASK]
    house = House(tmp_path)
    house.add(FILES | {TASK: wrong})
    house.write_indices()
    with pytest.raises(AssertionError, match="1 failed"):
        house.passes("tests/train/test_spectrogram.py")


@pytest.mark.everything
def test_the_task_trains_resumes_is_measured_and_heard(house: House) -> None:
    run = house.top / "run"
    said = zoo(
        house, "train", "model=tone_encoder", "trainer.max_steps=240", "trainer.val_every=120", "optim.lr=4e-3",
        "trainer.sample_every=100", "trainer.accumulate_grad_batches=2", "data.batch_size=8", f"run_dir={run}",
    )  # fmt: skip
    assert re.search(r"validation  loss \S+  spectrum loss \S+  stop loss \S+  distance \d+\.\d\d dB", said), said
    assert "frames/s" in said
    assert re.search(r"melody at step 100: 0\.\d\d s of sound", said), said
    with (run / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    distances = [row["val_log_spectral_distance"] for row in rows if "val_loss" in row]
    assert distances[-1] < 1.5, "the mean spectrum is 2.7 dB away"
    assert rows[-1]["val_loss_stop"] < 0.2, "a coin is 0.69"
    for row in rows:
        way = "val_" if "val_loss" in row else ""
        weighted = row[f"{way}loss_spectrum"] + 0.5 * row[f"{way}loss_stop"]
        assert row[f"{way}loss"] == pytest.approx(weighted, rel=1e-4)
    with wave.open(str(run / "melody.wav"), "rb") as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (8000, 1, 2)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32767
    assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-3)
    assert 0.3 < len(samples) / 8000 < 0.768
    heard = [tuple(map(float, line.split())) for line in house.python("-c", HEAR, str(run)).splitlines()]
    assert len(heard) >= 3
    for wanted, got in heard:
        assert abs(wanted - got) < 8000 / 256, heard  # a bin
    assert "is finished" in zoo(house, "resume", str(run))
    measured = dict(line.split() for line in zoo(house, "eval", str(run)).splitlines() if len(line.split()) == 2)
    assert float(measured["log_spectral_distance"]) == pytest.approx(distances[-1], rel=1e-4)


@pytest.mark.everything
def test_every_other_command_of_the_page(house: House) -> None:
    assert "it produces audio" in zoo(house, "show", "tone_encoder")
    small = ("model=tone_encoder", "data.batch_size=4", "model.n_layers=1")
    assert "frames/s" in zoo(house, "bench", *small, "steps=1", "repeats=1")
    assert "frames/s" in zoo(house, "profile", *small, "steps=1", f"run_dir={house.top / 'profile'}")
    zoo(
        house, "train", *small, "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=2",
        "trainer.accumulate_grad_batches=2", f"run_dir={house.top / 'two'}",
    )  # fmt: skip
    zoo(
        house, "train", *small, "memory.recompute=block", "trainer.max_steps=1", f"run_dir={house.top / 'recomputed'}"
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"memory is estimated for .* got ToneEncoder, say memory.recompute=block"):
        zoo(house, "train", *small, "memory=auto", "trainer.max_steps=1", f"run_dir={house.top / 'auto'}")
    with pytest.raises(AssertionError, match=r"zoo: .*text"):
        zoo(house, "generate", str(house.top / "two"), "--prompt", "x")


def test_it_costs_what_is_promised() -> None:
    """New files alone, and a task of no more than a page."""
    assert not [name for name in FILES if (ROOT / name).exists()]
    assert len(FILES[TASK].splitlines()) < 120
