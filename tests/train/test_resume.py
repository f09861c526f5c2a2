"""A run that is killed or interrupted goes on to the same numbers as if it had never stopped."""

import csv
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_jobs
from safetensors.torch import load_file
from tiny import config

from zoo.train.callbacks.log import row_due

CLOCK = {"tokens_per_second", "elapsed"}

# The tiny epoch has 7 batches; validation at 6, 12, 18; checkpoints at every 4th step and with each validation.
SETTINGS = {
    "dropout": config(
        trainer__val_every=6,
        trainer__checkpoint_every=4,
        trainer__log_every=3,
        trainer__max_steps=20,
        model__dropout=0.3,
    ),
    "accumulation": config(
        trainer__val_every=6,
        trainer__checkpoint_every=4,
        trainer__log_every=3,
        trainer__max_steps=10,
        trainer__accumulate_grad_batches=2,
        model__dropout=0.3,
    ),
}
# SIGKILL before any checkpoint; mid-epoch; right after a checkpoint and a validation; at an epoch's first batch
POINTS = [2, 9, 12, 14]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
SLURM = {
    "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """All runs of this file, in one process that imports everything once: {run's name: (exit code, output) of each}."""
    root = tmp_path_factory.mktemp("runs")
    jobs: list[tuple[str, dict[str, Any]]] = []

    def add(name: str, settings: dict[str, Any] | None, signals: str = "", **environment: str) -> None:
        job = {"do": "run", "config": settings} if settings else {"do": "resume"}
        environment["TINY_SIGNALS"] = signals
        jobs.append((name, job | {"run_dir": str(root / name), "environment": environment}))

    for name, settings in SETTINGS.items():
        add(name, settings)
        for point in POINTS:
            add(f"{name}-{point}", settings, f"9@{point}")
            add(f"{name}-{point}", None)
    add("twice", SETTINGS["dropout"], "9@7")
    add("twice", None, "9@15")
    add("twice", None)
    for number in SIGNALS:
        add(number.name, SETTINGS["dropout"], f"{int(number)}@8")
        add(number.name, None)
        add(number.name, None)
    add("slurm", SETTINGS["dropout"], f"{int(signal.SIGUSR1)}@8", **SLURM)
    add("slurm", None, **SLURM)
    add("at-validation", SETTINGS["dropout"], "2@5")
    add("at-validation", None)
    add("ctrl-c-twice", SETTINGS["dropout"], "2@5 2@5")
    found: dict[str, list[tuple[int, str]]] = {"root": [(0, str(root))]}
    for (name, _), result in zip(jobs, run_jobs(root, [job for _, job in jobs]), strict=True):
        found.setdefault(name, []).append(result)
    return found


def run_dir(results: dict[str, list[tuple[int, str]]], name: str) -> Path:
    return Path(results["root"][0][1]) / name


def table(run: Path) -> list[dict[str, str]]:
    """metrics.csv as it was printed, without the columns that measure time."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def assert_same_run(run: Path, want: Path) -> None:
    assert table(run) == table(want)
    ours, theirs = (load_file(r / "checkpoint" / "model.safetensors") for r in (run, want))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("name", SETTINGS)
def test_the_uninterrupted_run_logs_every_row(results: dict[str, list[tuple[int, str]]], name: str) -> None:
    assert results[name][0][0] == 0, results[name][0][1]
    last = SETTINGS[name]["trainer"]["max_steps"]
    rows = table(run_dir(results, name))
    assert [int(r["step"]) for r in rows if r["loss"]] == [s for s in range(1, last + 1) if row_due(s, 3) or s == last]
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [s for s in range(1, last + 1) if s % 6 == 0 or s == last]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_sigkill_then_resume_is_the_uninterrupted_run(
    results: dict[str, list[tuple[int, str]]], name: str, point: int
) -> None:
    (killed, said), (resumed, output) = results[f"{name}-{point}"]
    assert killed == -signal.SIGKILL, said
    assert resumed == 0, output
    assert_same_run(run_dir(results, f"{name}-{point}"), run_dir(results, name))


def test_killed_twice(results: dict[str, list[tuple[int, str]]]) -> None:
    assert [code for code, _ in results["twice"]] == [-9, -9, 0], results["twice"]
    assert_same_run(run_dir(results, "twice"), run_dir(results, "dropout"))


@pytest.mark.parametrize("name", [number.name for number in SIGNALS])
def test_signal_finishes_the_step_saves_and_exits_130(results: dict[str, list[tuple[int, str]]], name: str) -> None:
    run = run_dir(results, name)
    (code, said), (resumed, output), (again, finished) = results[name]
    assert (code, resumed, again) == (130, 0, 0), said + output + finished
    assert said.splitlines()[-1] == f"interrupted; zoo resume {run} goes on from here"
    assert "Traceback" not in said
    assert "step 9/" in said  # the signal came while the 9th batch was fetched
    assert "step 12/" not in said
    assert "finished" in finished
    assert_same_run(run, run_dir(results, "dropout"))


def test_a_job_of_slurm_has_no_checkpoints_beside_ours(results: dict[str, list[tuple[int, str]]]) -> None:
    """Lightning's own, written at SIGUSR1, would come before ours at every later start."""
    assert [code for code, _ in results["slurm"]] == [130, 0], results["slurm"]
    run = run_dir(results, "slurm")
    assert not list(run.glob("**/hpc_ckpt*"))
    assert_same_run(run, run_dir(results, "dropout"))


def test_interrupt_at_a_validation_step_waits_for_it(results: dict[str, list[tuple[int, str]]]) -> None:
    assert [code for code, _ in results["at-validation"]] == [130, 0], results["at-validation"]
    assert "validation" in results["at-validation"][0][1]
    assert_same_run(run_dir(results, "at-validation"), run_dir(results, "dropout"))


def test_second_ctrl_c_ends_at_once(results: dict[str, list[tuple[int, str]]]) -> None:
    [(code, output)] = results["ctrl-c-twice"]
    assert code == -signal.SIGINT
    assert "step 6" not in output
    assert (run_dir(results, "ctrl-c-twice") / "checkpoints" / "last.ckpt").exists()
