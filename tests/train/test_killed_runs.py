"""Runs of every kind of model: killed in the middle, resumed, and then as if nothing had happened; two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KINDS = {
    "vit": ("model=vit", "model.n_layers=1", "data.batch_size=16"),
    "encoder_decoder": (
        "model=encoder_decoder", "model.d_model=32", "model.n_layers=1", "model.hidden_size=32", "data.batch_size=8",
        "data.val_samples=16",
    ),
}  # fmt: skip
STEPS = (
    "trainer.max_steps=60", "trainer.val_every=20", "trainer.log_every=10", "trainer.checkpoint_every=10",
    "trainer.sample_every=0", "trainer.accelerator=cpu", "trainer.limit_val_batches=2",
)  # fmt: skip


def start(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def rows(run: Path) -> list[list[str]]:
    head, *lines = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    kept = [i for i, name in enumerate(head) if not name.endswith("_per_second") and name != "elapsed"]
    return [[line[i] for i in kept] for line in lines]


@pytest.mark.everything
@pytest.mark.parametrize("kind", KINDS)
def test_sigkill_then_resume_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start("train", *KINDS[kind], *STEPS, f"run_dir={whole}")
    output, _ = done.communicate(timeout=200)
    assert done.returncode == 0, output
    half = start("train", *KINDS[kind], *STEPS, f"run_dir={killed}")
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    half.send_signal(signal.SIGKILL)
    half.communicate(timeout=60)
    assert half.returncode == -signal.SIGKILL
    assert not (killed / "checkpoint").exists(), "it was killed too late"
    again = start("resume", str(killed))
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert rows(killed) == rows(whole)


@pytest.mark.everything
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_and_context_parallelism_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    more = ("trainer.devices=2", f"run_dir={tmp_path / 'run'}")
    done = start("train", *KINDS[kind], *STEPS, "strategy=ddp", *more)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    done = start("train", *KINDS[kind], *STEPS, "strategy=allgather", "trainer.devices=2", f"run_dir={tmp_path / 'cp'}")
    output, _ = done.communicate(timeout=300)
    assert done.returncode in (1, 2), output
    assert "Traceback" not in output
    assert "none that may be cut; use strategy=ddp" in output
