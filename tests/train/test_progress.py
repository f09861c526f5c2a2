"""What a user sees while a run trains: how far, how long still, the newest numbers, on terminals of any width."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import config

from zoo.train.callbacks.log import row_due
from zoo.train.callbacks.progress import Bar, ProgressLine
from zoo.train.clock import Clock
from zoo.train.optim import Limits
from zoo.train.run import fit
from zoo.train.run.loggers import read_csv

ROW = {
    "loss": 2.12341, "bits_per_byte": 3.0634, "perplexity": 8.36, "lr": 1.99e-3, "grad_norm": 1.0,
    "tokens_per_second": 10_512.0, "elapsed": 42.0, "skipped_steps": 0,
}  # fmt: skip


class Stopped(Clock):
    """A clock that stands where a test puts it."""

    def elapsed(self) -> float:
        return self.now


def at(step: int, seconds: float, limits: Limits, *, row: dict[str, float] = ROW, first: float = 40.0) -> ProgressLine:
    """A line after `step` updates and so many seconds, `first` of them for the first update."""
    clock = Stopped()
    line = ProgressLine(limits, clock)
    if step:
        clock.now = first
        line.advance(1)
        line.row = row
    clock.now = seconds
    if step:
        line.advance(step)
    return line


def rendered(line: ProgressLine, width: int) -> str:
    """The line as a terminal of this width gets it."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(line)
    return capture.get()


@pytest.mark.parametrize("width", [20, 40, 60, 100, 200])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_steps=1000, max_seconds=None),
        Limits(max_steps=None, max_seconds=240.0),
        Limits(max_steps=1000, max_seconds=240.0),
    ],
)
@pytest.mark.parametrize("validated", [None, (3, 12)])
def test_one_line_fits_any_width(width: int, limits: Limits, validated: tuple[int, float] | None) -> None:
    line = at(101, 140.0, limits)
    line.validated = validated
    text = rendered(line, width)
    assert text.count("\n") == 1
    assert len(text.rstrip("\n")) <= width
    assert "step 101" in text or validated is not None
    assert ("validation 3/12" in text) == (validated is not None)


def test_what_matters_most_stays_on_a_narrow_terminal() -> None:
    line = at(101, 140.0, Limits(max_steps=1000, max_seconds=None))  # a second a step behind the first
    assert rendered(line, 40).strip() == "step 101/1000  loss 2.1234  14:59 left"
    assert rendered(line, 60).strip() == "10%  step 101/1000  loss 2.1234  tokens/s 10.5k  14:59 left"
    wide = rendered(line, 100)
    assert "bits/byte 3.0634" in rendered(line, 120)
    assert "━━" in wide
    assert "━" not in rendered(line, 60)
    for words in (
        " 10%",
        "step 101/1000",
        "loss 2.1234",
        "tokens/s 10.5k",
        "time 2:20",
        "14:59 left",
    ):
        assert words in wide


def test_the_nearer_limit_says_how_long_still() -> None:
    assert at(101, 140.0, Limits(max_steps=1000, max_seconds=240.0)).remaining() == 100.0
    assert at(101, 140.0, Limits(max_steps=150, max_seconds=240.0)).remaining() == pytest.approx(49.0)
    assert "time 2:20/4:00" in at(101, 140.0, Limits(max_steps=None, max_seconds=240.0)).words(100)
    assert " 58%" in at(101, 140.0, Limits(max_steps=1000, max_seconds=240.0)).words(100)
    assert at(200, 500.0, Limits(max_steps=None, max_seconds=240.0)).remaining() == 0.0, "the last step may end late"


def test_the_time_left_only_falls_while_a_step_runs() -> None:
    line = at(101, 140.0, Limits(max_steps=1000, max_seconds=None))
    line.clock.now += 5.0
    assert line.remaining() == pytest.approx(899.0 - 5.0)


def test_nothing_is_guessed_before_two_steps() -> None:
    assert at(0, 7.0, Limits(max_steps=1000, max_seconds=None)).remaining() is None
    assert at(1, 41.0, Limits(max_steps=1000, max_seconds=None)).remaining() is None
    assert at(0, 7.0, Limits(max_steps=None, max_seconds=240.0)).remaining() == 233.0
    assert rendered(at(0, 7.0, Limits(max_steps=1000, max_seconds=None)), 40).strip() == "0%  step 0/1000  time 0:07"


class Watched(Bar):
    """Keeps what the screen would show when training begins, at every row and at every batch of validation."""

    rows: list[str]
    batches: list[str]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Watched.rows, Watched.batches = [], []

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self.rows.append(self.line.words(60))

    def show(self, step: int, row: dict[str, float]) -> None:
        super().show(step, row)
        if "val_loss" not in row:
            self.rows.append(self.line.words(60))

    def on_validation_batch_end(self, *args: Any) -> None:
        super().on_validation_batch_end(*args)
        self.batches.append(self.line.words(60))


@pytest.mark.parametrize("columns", [40, 60])
def test_a_run_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(fit, "Bar", Watched)
    assert fit.run(config(trainer__log_every=20, trainer__max_steps=9, trainer__val_every=6), tmp_path / "run") == 0
    assert "step 0/9" in Watched.rows[0]
    assert "step 1/9" in Watched.rows[1]
    assert "loss" in Watched.rows[1], "the first step is shown at once"
    assert not [words for words in Watched.rows if "validation" in words]
    assert ["validation 1/2" in words for words in Watched.batches] == [True, False, True, False]
    assert ["validation 2/2" in words for words in Watched.batches] == [False, True, False, True]
    assert "step 6/9" in Watched.batches[0]
    screen = capsys.readouterr().out
    assert "step 6  validation" in screen
    assert "\x1b[" in screen


def test_a_file_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.run(config(trainer__log_every=20, trainer__max_steps=9, trainer__val_every=6), tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ") and "validation" not in line]
    assert steps == ["1/9", "2/9", "3/9", "4/9", "6/9", "8/9", "9/9"]


def test_short_runs_have_enough_rows(tmp_path: Path) -> None:
    assert [step for step in range(81) if row_due(step, 20)] == [1, 2, 3, 4, 6, 8, 12, 16, 20, 40, 60, 80]
    assert [step for step in range(8) if row_due(step, 1)] == [1, 2, 3, 4, 5, 6, 7]
    assert fit.run(config(trainer__log_every=20, trainer__max_steps=25, trainer__val_every=50), tmp_path / "run") == 0
    logged = [row["step"] for row in read_csv(tmp_path / "run" / "metrics.csv") if "loss" in row]
    assert logged == [1, 2, 3, 4, 6, 8, 12, 16, 20, 25]
