"""Runs of several processes under context parallelism: interrupted, resumed, with cut weights, and with a lost rank."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config

import zoo

HERE = Path(__file__).parent
ALLOWED = {"ZOO_ALLOW_PACKAGES": "sharded_data"}  # the package of the data that the runs' configs name
UNEQUAL = ("tokens_per_second", "elapsed")


def settings(strategy: str, **trainer: Any) -> dict[str, Any]:
    made = config()
    made["model"] = {"name": "gla", "size": "tiny", "d_model": 16, "n_layers": 2, "hidden_size": 16, "vocab_size": None}
    made["data"] = {"_target_": "sharded_data.Data", "rows": 2, "length": 17}
    made["trainer"] |= {"devices": 2, "val_every": 6, "checkpoint_every": 4, "max_steps": 12, **trainer}
    made["strategy"] = {"_target_": f"zoo.train.strategies.{strategy}", "method": "zeco", "timeout": 240.0}
    return made


def launch(run: Path, made: dict[str, Any] | None, signal: str = "0 -1 0") -> subprocess.CompletedProcess[str]:
    """As a console script is started: Lightning starts the second process with the same command."""
    return subprocess.run(
        [sys.executable, str(HERE / "console_script.py"), str(run), json.dumps(made)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, **ALLOWED, "OMP_NUM_THREADS": "1", "SIGNAL_RANK": signal},
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in UNEQUAL} for row in csv.DictReader(file)]


def measured(run: Path, *settings: str) -> str:
    """What `zoo eval` prints."""
    environment = {**os.environ, **ALLOWED, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    words = [sys.executable, "-m", "zoo", "eval", str(run), *settings]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.everything
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """And with weights cut over the ranks every number is the same, too."""
    made = settings("ContextParallelStrategy", accumulate_grad_batches=2)
    whole = launch(tmp_path / "whole", made)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    stopped = launch(tmp_path / "cut", made, "2 5 1")
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert stopped.stdout.splitlines()[-1] == f"interrupted; zoo resume {tmp_path / 'cut'} goes on from here"
    resumed = launch(tmp_path / "cut", None)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")

    fsdp = launch(tmp_path / "fsdp", settings("ContextParallelFSDPStrategy", accumulate_grad_batches=2))
    assert fsdp.returncode == 0, fsdp.stdout + fsdp.stderr
    for ours, want in zip(rows(tmp_path / "fsdp"), rows(tmp_path / "whole"), strict=True):
        for name, value in want.items():
            assert (ours[name] == value == "") or float(ours[name]) == pytest.approx(float(value), rel=1e-4), name
    weights = [zoo.load(tmp_path / name).state_dict() for name in ("whole", "fsdp")]
    for name, want in weights[0].items():
        assert torch.allclose(weights[1][name], want, rtol=1e-3, atol=1e-5), name

    alone = measured(tmp_path / "whole")  # one device, whatever the run had
    assert alone.startswith("loss ")
    assert measured(tmp_path / "whole", "strategy=lasp2_fsdp", "trainer.devices=2") == alone


@pytest.mark.everything
def test_a_killed_rank_ends_the_others_with_a_reason(tmp_path: Path) -> None:
    start = time.monotonic()
    done = launch(tmp_path / "run", settings("ContextParallelStrategy"), "9 5 1")
    assert done.returncode not in (0, 130)
    # whichever is first: the rank that notices, or Lightning, whose launcher ends every process when one has died
    noticed = "rank 0 of 2 lost another rank, which ended or did not answer within strategy.timeout"
    assert noticed in done.stderr or "terminated with code -9. Forcefully terminating" in done.stderr
    assert time.monotonic() - start < 230  # below the timeout; most of it is starting two processes on a busy machine
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
