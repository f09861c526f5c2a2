"""Whole runs in this process: the folder, the limits, the refusals."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from processes import run_jobs
from rich.console import Console
from tiny import config

import zoo
from zoo.errors import UserError
from zoo.train.callbacks.progress import describe, duration
from zoo.train.clock import Clock
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """Runs that end badly, in one process that imports everything once: (their folder, (exit code, output) of each)."""
    root = tmp_path_factory.mktemp("broken")
    timed = config(trainer__max_steps=None, trainer__max_time="00:30", trainer__checkpoint_every=1)
    full = config(trainer__max_steps=12, trainer__val_every=4, trainer__checkpoint_every=2)
    jobs: list[dict[str, Any]] = [
        {"do": "run", "run_dir": str(root / "timed"), "config": timed, "environment": {"TINY_SIGNALS": "15@6"}},
        {"do": "run", "run_dir": str(root / "full"), "config": full, "environment": {"TINY_SIGNALS": "15@4"}},
        {"do": "resume", "run_dir": str(root / "full"), "file_size": 6000},
        {
            "do": "run",
            "run_dir": str(root / "full-interrupt"),
            "config": full,
            "environment": {"TINY_SIGNALS": "15@4"},
            "file_size": 6000,
        },
        {"do": "run", "run_dir": str(root / "damaged"), "config": config(), "environment": {"TINY_SIGNALS": "9@3"}},
    ]
    return root, run_jobs(root, jobs)


def test_a_run_leaves_a_complete_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert fit.run(config(), run) == 0
    captured = capsys.readouterr()
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "command.txt", "versions.json", "metrics.csv", "log.txt", "loss.png", "checkpoints/last.ckpt",
        "checkpoints/best.ckpt", "checkpoint/model.safetensors", "checkpoint/config.json", "checkpoint/letters.txt",
    }  # fmt: skip
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"] == {"name": "tiny-test", "size": "tiny", "d_model": 8, "vocab_size": 11, "dropout": 0.0}
    assert saved["trainer"]["max_steps"] == 4
    versions = json.loads((run / "versions.json").read_text())
    assert {"python", "torch", "lightning", "triton", "zoo", "commit", "devices"} <= versions.keys()

    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[-1] == f"run: {run}"
    assert lines[-2].startswith("final validation  loss ")
    assert "bits/byte" in lines[-2]
    assert "sample:" in lines
    assert (run / "log.txt").read_text() == captured.out
    assert sum(line.startswith("step ") for line in lines) == 6  # 4 steps, validation at 3 and at the end

    model = zoo.load(run)
    assert not model.training
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last["state_dict"][f"model.{name}"])


def test_best_is_the_lowest_validation_loss(tmp_path: Path) -> None:
    # a learning rate that ruins the model after the first validation
    settings = config(trainer__max_steps=6, trainer__val_every=2, optim__lr=3.0, optim__warmup_steps=0)
    settings["trainer"]["gradient_clip_val"] = None
    assert fit.run(settings, tmp_path / "run") == 0
    losses = {int(r["step"]): float(r["val_loss"]) for r in rows(tmp_path / "run") if r["val_loss"]}
    lowest = min(losses, key=lambda step: losses[step])
    assert lowest != 6, "the test needs a run that gets worse"
    best, last = (
        torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last")
    )
    assert (best["global_step"], last["global_step"]) == (lowest, 6)


def test_evaluate_gives_the_numbers_of_the_last_validation(tmp_path: Path) -> None:
    assert fit.run(config(data__val_batches=2), tmp_path / "run") == 0
    last = rows(tmp_path / "run")[-1]
    found = evaluate(tmp_path / "run")
    for name in ("loss", "bits_per_byte", "perplexity"):
        assert found[name] == pytest.approx(float(last[f"val_{name}"]), rel=1e-5)
    assert evaluate(tmp_path / "run", ["data.val_batches=5"])["loss"] != found["loss"]
    with pytest.raises(UserError, match=r"no setting 'data\.sed'"):
        evaluate(tmp_path / "run", ["data.sed=1"])


def test_accuracy_is_the_metric_of_a_synthetic_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(data__metrics=["accuracy"], trainer__max_steps=60, trainer__val_every=60, optim__lr=0.05)
    settings["trainer"]["log_every"] = 30
    assert fit.run(settings, tmp_path / "run") == 0
    last = rows(tmp_path / "run")[-1]
    assert 0.5 < float(last["val_accuracy"]) < 1.0  # every fifth letter is noise
    assert float(last["val_sequence_accuracy"]) < float(last["val_accuracy"])
    assert "bits_per_byte" not in last
    output = capsys.readouterr().out
    assert "sample" not in output
    assert f"accuracy {float(last['val_accuracy']):.4f}" in output.splitlines()[-2]


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import Tiny

    encode = Tiny.encode
    calls = 0

    def failing(self: Tiny, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += self.training
        hidden, state = encode(self, *args, **options)
        return hidden * (math.nan if calls > 5 and self.training else 1.0), state

    monkeypatch.setattr(Tiny, "encode", failing)
    settings = config(trainer__max_steps=50, task__max_nonfinite_steps=4)
    with pytest.raises(UserError, match="not finite for 4 steps in a row, up to step 9"):
        fit.run(settings, tmp_path / "run")
    found = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(t.isfinite().all() for t in found["state_dict"].values())
    assert [r["skipped_steps"] for r in rows(tmp_path / "run") if r["loss"]][-3:] == ["1", "2", "3"]
    assert "error: the loss or its gradient was not finite" in (tmp_path / "run" / "log.txt").read_text()


@pytest.fixture
def clock_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by a second per reading of the step's start."""
    readings = {"n": 0.0}

    def elapsed(self: Clock) -> float:
        readings["n"] += 0.25
        return self._before + readings["n"]

    monkeypatch.setattr(Clock, "elapsed", elapsed)


@pytest.mark.usefixtures("clock_of_steps")
def test_max_time_ends_the_run_and_the_schedule(tmp_path: Path) -> None:
    settings = config(trainer__max_steps=None, trainer__max_time="00:10", trainer__val_every=1000)
    settings["trainer"]["checkpoint_every"] = 0
    assert fit.run(settings, tmp_path / "run") == 0
    found = rows(tmp_path / "run")
    rates = [float(r["lr"]) for r in found if r["lr"]]
    assert 10 < len(rates) < 41
    assert rates[-1] == pytest.approx(0.1 * 2e-3, rel=0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert found[-1]["val_loss"]


@pytest.mark.everything
def test_max_time_counts_all_sittings(broken: tuple[Path, list[tuple[int, str]]]) -> None:
    run, (code, said) = broken[0] / "timed", broken[1][0]
    assert code == 130, said
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved["zoo"]["elapsed"] = 1e6  # as if it had trained for long
    torch.save(saved, run / "checkpoints" / "last.ckpt")
    assert fit.resume(run) == 0
    assert max(int(r["step"]) for r in rows(run)) == 7


def test_max_epochs_are_passes_over_the_data(tmp_path: Path) -> None:
    settings = config(trainer__max_steps=None, trainer__max_epochs=2, trainer__accumulate_grad_batches=2)
    assert fit.run(settings, tmp_path / "run") == 0
    assert max(int(r["step"]) for r in rows(tmp_path / "run")) == 7  # 2 epochs of 7 batches, 2 a step


def test_fast_dev_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    assert fit.run(config(trainer__fast_dev_run=2), tmp_path / "run") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_full_disk_keeps_the_old_checkpoint(broken: tuple[Path, list[tuple[int, str]]]) -> None:
    run, (first, _), (code, said) = broken[0] / "full", broken[1][1], broken[1][2]
    assert (first, code) == (130, 1), said
    assert said.count("warning:") - said.count("loss.png") == 1
    assert f"warning: {run}/checkpoints/last.ckpt could not be written (File too large); the one before stays" in said
    assert "Traceback" not in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert not list(run.rglob("*.partial"))
    assert rows(run)[-1]["step"] == "12"


def test_an_interrupt_on_a_full_disk_is_a_failure(broken: tuple[Path, list[tuple[int, str]]]) -> None:
    code, said = broken[1][3]
    assert code == 1, said
    assert "interrupted, and no checkpoint could be written" in said.splitlines()[-1]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files; give another run_dir="):
        fit.run(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert fit.run(config(trainer__max_steps=1), tmp_path / "run") == 0
    before = (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(UserError, match=f"zoo resume {tmp_path}/run goes on"):
        fit.run(config(), tmp_path / "run")
    assert (tmp_path / "run" / "log.txt").read_text() == before


def test_resume_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        fit.resume(tmp_path)


def test_resume_of_a_damaged_checkpoint_is_refused(broken: tuple[Path, list[tuple[int, str]]]) -> None:
    run, (code, said) = broken[0] / "damaged", broken[1][4]
    assert code == -9, said
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        fit.resume(run)


def test_a_vocabulary_smaller_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size is 5 and the data have 11 tokens"):
        fit.run(config(model__vocab_size=5), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert fit.run(config(model__vocab_size=16, trainer__max_steps=1), tmp_path / "larger") == 0


def test_rows_in_words() -> None:
    row = {"loss": 1.23456, "bits_per_byte": 1.8, "lr": 2e-3, "tokens_per_second": 10512.0, "elapsed": 75.0}
    assert describe(row) == "loss 1.2346  bits/byte 1.8000  lr 2.00e-03  tokens/s 10.5k  time 1:15"
    assert describe({"val_loss": 2.0}) == "validation  loss 2.0000"
    sets = {"val_loss": 2.0, "val_accuracy": 0.5, "val_accuracy_at_32": 0.75, "val_last_accuracy_at_32": 1.0}
    assert describe(sets) == "validation  loss 2.0000  accuracy 0.5000  accuracy@32 0.7500  last right@32 1.0000"
    assert "skipped steps 3" in describe({"loss": 1.0, "skipped_steps": 3})
    assert duration(3 * 3600 + 5) == "3:00:05"


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(fit, "Console", lambda: Console(force_terminal=True, width=120))
    assert fit.run(config(), tmp_path / "run") == 0
    output = capsys.readouterr().out
    assert "100%" in output
    assert "step 3  validation  loss" in output
    assert output.rstrip().splitlines()[-1] == f"run: {tmp_path / 'run'}"
    assert "step 4  loss" in (tmp_path / "run" / "log.txt").read_text()


def launch(run: Path, settings: dict[str, Any] | None, signals: str = "") -> subprocess.CompletedProcess[str]:
    """A run started as a console script is: Lightning starts the second process with the same command."""
    script = Path(__file__).parent / "console_script.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_SIGNALS": signals}
    return subprocess.run(
        [sys.executable, str(script), str(run), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@pytest.mark.everything
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    two = config(trainer__max_steps=3, trainer__devices=2, data__batch_size=2, data__pad=True)
    one = config(trainer__max_steps=3, trainer__devices=1, data__batch_size=4, data__pad=True)
    done = launch(tmp_path / "two", two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fit.run(one, tmp_path / "one") == 0
    assert done.stdout.count("run: ") == 1
    for ours, want in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["step"] == want["step"]
        for name in ("loss", "bits_per_byte", "lr", "grad_norm", "val_loss"):
            if want[name]:
                assert float(ours[name]) == pytest.approx(float(want[name]), rel=1e-5), name


@pytest.mark.everything
def test_two_processes_stop_and_resume_together(tmp_path: Path) -> None:
    settings = config(trainer__max_steps=14, trainer__devices=2, trainer__val_every=50, model__dropout=0.3)
    settings["trainer"]["accumulate_grad_batches"] = 2
    whole, stopped = (launch(tmp_path / name, settings, signals) for name, signals in (("whole", ""), ("cut", "2@5")))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert stopped.stdout.splitlines()[-1] == f"interrupted; zoo resume {tmp_path / 'cut'} goes on from here"
    resumed = launch(tmp_path / "cut", None)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for ours, want in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in ours.items() if k not in ("tokens_per_second", "elapsed")} == {
            k: v for k, v in want.items() if k not in ("tokens_per_second", "elapsed")
        }


def test_settings_that_lightning_refuses_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer settings that Lightning refuses"):
        fit.run(config(trainer__accelerator="abacus"), tmp_path / "run")


def test_layers_that_solve_for_their_states_say_how_well(tmp_path: Path) -> None:
    settings = config()
    settings["model"] = {
        "name": "para_lstm", "size": "tiny", "d_model": 8, "n_layers": 2, "n_heads": 1, "hidden_size": 16,
        "vocab_size": 11, "iterations": 1,
    }  # fmt: skip
    settings["trainer"]["log_every"] = 2
    assert fit.run(settings, tmp_path / "run") == 0
    found = [float(row["residual"]) for row in rows(tmp_path / "run") if row["loss"]]
    assert len(found) == 3  # steps 1, 2 and 4
    assert all(0 < x < 1 for x in found)


@pytest.mark.parametrize(("steps", "kept"), [(0, False), (1, True), (7, True)])
def test_a_run_that_is_refused_before_its_first_update_leaves_no_folder(steps: int, kept: bool) -> None:
    """After one update there is something to keep."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UserError("no")

    there = [True]
    trainer: Any = SimpleNamespace(fit=refuse, global_step=steps)
    folder: Any = SimpleNamespace(discard=there.clear, path="run")
    data: Any = SimpleNamespace()
    with pytest.raises(UserError, match="no"):
        fit._run(trainer, None, data, None, folder)  # type: ignore[arg-type]
    assert bool(there) == kept
