"""What `zoo bench` says while it measures, and what Ctrl-C leaves."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from zoo import cli
from zoo.bench import operators, steps
from zoo.bench.compare_commits import _Worker
from zoo.bench.models import run_model
from zoo.bench.operators import OperatorBench
from zoo.bench.report import markdown
from zoo.bench.steps import ModelRequest
from zoo.cli.status import StatusLine
from zoo.config import compose

SMALL = ["op=causal_conv1d", "T=40,80", "B=1", "D=6", "repeats=3", "backends=torch,reference", "device=cpu"]
MODEL = ["model=gla", "model.n_layers=1", "model.d_model=32", "data=pydocs", "data.batch_size=2", "data.seq_len=48"]
SLOW_ECHO = """
import json, sys, time
for line in sys.stdin:
    time.sleep(json.loads(line)["seconds"])
    print(line, end="", flush=True)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed means nothing in a test."""
    monkeypatch.setattr(operators, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr("zoo.bench.models.matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr("zoo.bench.measure.SAMPLE", 1e-4)
    monkeypatch.setattr(operators, "peak_bytes", lambda call, _: 1000)
    monkeypatch.setattr(steps, "peak_bytes", lambda call, _: 1000)


def stop_in_round(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C when the last case is about to be timed in this round."""
    real, rounds = OperatorBench.round, 0

    def round_(self: OperatorBench) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == number:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(OperatorBench, "round", round_)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_terminal_has_one_line_that_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    with StatusLine(terminal) as say:
        say("delta_rule T=2048: checking torch against float64")
        say("delta_rule: round 2 of 10; " + "x" * 200)
    assert "\n" not in terminal.getvalue()
    first, second, last = terminal.getvalue().removeprefix("\r\033[K").split("\r\033[K")
    assert first.startswith("[0:00] delta_rule T=2048: checking")
    assert len(first) < width
    assert len(second) == width - 1
    assert last == "", "the line is taken away at the end"


def test_a_file_has_plain_lines_and_the_first_times_early(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "[0:" not in out, "the table stands alone in standard output"
    assert "\r" not in err
    assert "\x1b" not in err
    lines = [line.partition("] ")[2] for line in err.splitlines()]
    first = lines.index("causal_conv1d: round 1 of 3")
    assert any("checking torch against float64" in line for line in lines[:first])
    assert any("warming up reference" in line for line in lines[:first])
    assert lines[first + 1].startswith("causal_conv1d: round 2 of 3; causal_conv1d ")
    assert "forward+backward: torch " in lines[first + 1]
    assert ", reference " in lines[first + 1]


def test_ctrl_c_leaves_the_table_of_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_in_round(monkeypatch, 3)
    assert cli.main(["bench", *SMALL, f"out={tmp_path / 'r.json'}"]) == 130
    out, err = capsys.readouterr()
    assert "**interrupted**: only what was measured until then" in out
    rows = [line for line in out.splitlines() if line.startswith(("| torch", "| reference"))]
    assert len(rows) == 8, "two lengths, two sides, two phases"
    assert all("n=2" in row for row in rows)
    said = f"zoo: interrupted; the table holds what was measured until then, and nothing was written to {tmp_path}"
    assert err.splitlines()[-1].startswith(said)
    assert not (tmp_path / "r.json").exists()


def test_operators_that_were_not_reached_are_not_in_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_round(monkeypatch, 2)
    words = ["op=rms_norm,causal_conv1d", "T=40", "B=1", "D=6", "repeats=1", "backends=torch", "device=cpu"]
    assert cli.main(["bench", *words]) == 130
    out = capsys.readouterr().out
    assert "**rms_norm**" in out
    assert "**causal_conv1d**" not in out


def test_a_model_that_is_interrupted_keeps_its_rounds() -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "round 3 of 4" in text:
            os.kill(os.getpid(), signal.SIGINT)

    record = run_model(ModelRequest(compose(MODEL), steps=1, repeats=4), say)
    assert record.is_interrupted
    assert not record.is_red
    assert "decoding" not in said[-1]
    (training,) = record.cases
    times = {side.name: len(side.phases["training step"].times) for side in training.sides}
    assert times == {"bare loop": 3, "lightning": 2, "linear layers alone": 3, "all products alone": 3}
    assert "**interrupted**" in markdown(record)
    with pytest.raises(KeyboardInterrupt):
        run_model(ModelRequest(compose(MODEL), steps=1, repeats=1), lambda _: os.kill(os.getpid(), signal.SIGINT))


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Ctrl-C after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_was_interrupted_answers_the_next_question() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    one = _Worker("one", process)
    try:
        assert one.ask({"seconds": 0, "number": 1})["number"] == 1
        with pytest.raises(KeyboardInterrupt), alarm(0.2):
            one.ask({"seconds": 1, "number": 2})
        assert one.ask({"seconds": 0, "number": 3})["number"] == 3
        assert one.unanswered == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
