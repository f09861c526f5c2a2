"""`zoo train -m`: every combination of the listed values, a process and a folder each, and a sorted table."""

import csv
import hashlib
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from zoo.cli.runs import finished, fresh_folder
from zoo.config import compose, fixed, sweep
from zoo.errors import UsageError, UserError, remedy

# The columns of metrics.csv to sort by when none is named, best first; a larger value is better where True.
METRICS = {"val_bits_per_byte": False, "val_accuracy": True, "val_perplexity": False, "val_loss": False}
COMMON = "sweep.txt"  # in the folder of a sweep: the settings that all its runs share
TABLE = "sweep.csv"


@dataclass(frozen=True)
class Run:
    """One combination of values and its folder."""

    values: dict[str, str]
    folder: Path

    @property
    def settings(self) -> list[str]:
        """The values as words of a command line, as "optim.lr=0.001"."""
        return [f"{key}={value}" for key, value in self.values.items()]


def sweep_command(settings: list[str], config_dir: Path | None, metric: str | None) -> int:
    """Run all combinations; 0 when every run finished, 1 when one failed, 130 when interrupted.

    A sweep with the same run_dir continues: finished runs are kept, interrupted ones resumed.
    """
    common = [word for word in fixed(settings) if not word.startswith("run_dir=")]
    folder = _folder(settings)
    combinations = sweep(settings)
    if any("run_dir" in values for values in combinations):
        raise UsageError("a sweep has one run_dir, in which each run gets a folder; give a single one")
    for values in combinations:  # all settings are checked before the first run starts
        compose([*common, *(f"{key}={value}" for key, value in values.items())], config_dir=config_dir)
    _claim(folder, common, config_dir)
    runs = [Run(values, folder / folder_name(values)) for values in combinations]
    status: dict[Path, str] = {}
    interrupted = False
    for number, run in enumerate(runs, 1):
        if interrupted:
            break
        print(f"[{number}/{len(runs)}] {' '.join(run.settings) or 'run'} -> {run.folder}", flush=True)
        if finished(run.folder):
            status[run.folder] = "kept"
            continue
        code, interrupted = _spawn(_command(run, common, config_dir))
        status[run.folder] = "done" if code == 0 else "interrupted" if code == 130 else f"failed ({code})"
    rows, column = collect(runs, status, metric)
    write_table(folder / TABLE, rows)
    show_table(rows, column)
    print(f"{folder / TABLE}")
    if interrupted:
        print(f"interrupted; to go on: zoo train -m {shlex.join(_with_folder(settings, folder))}", file=sys.stderr)
        return 130
    return 0 if all(state in ("done", "kept") for state in status.values()) else 1


def folder_name(values: dict[str, str]) -> str:
    """A readable folder name that is the same for the same values and differs for different ones."""
    plain = ",".join(f"{key}={value}" for key, value in values.items()) or "run"
    safe = re.sub(r"[^\w.,=+-]+", "_", plain)
    if safe == plain and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def collect(
    runs: Sequence[Run], status: dict[Path, str], metric: str | None
) -> tuple[list[dict[str, str]], str | None]:
    """One row per run, sorted by the metric (the last value in metrics.csv), runs without it last; and the column."""
    last = {run.folder: last_values(run.folder / "metrics.csv") for run in runs}
    columns = list(dict.fromkeys(name for values in last.values() for name in values))
    if metric is not None and columns and metric not in columns:
        end = remedy(metric, columns, f"there is {', '.join(columns)}")
        raise UserError(f"no column {metric!r} in metrics.csv{end}")
    column = metric or next((name for name in METRICS if name in columns), None)
    sign = -1.0 if column is not None and larger_is_better(column, runs) else 1.0

    def rank(run: Run) -> float:
        value = float(last[run.folder].get(column or "", "nan"))
        return math.inf if math.isnan(value) else sign * value

    rows = []
    for run in sorted(runs, key=rank):
        measured = {column: last[run.folder].get(column, "")} if column else {}
        rows.append({**run.values, **measured, "status": status.get(run.folder, "not run"), "run": str(run.folder)})
    return rows, column


def larger_is_better(column: str, runs: Sequence[Run]) -> bool:
    """Whether the best run has the largest value of a column, by the word of the metric behind it."""
    if column in METRICS:
        return METRICS[column]
    from zoo.train.metrics.table import metric_of  # torch, which a sweep of known columns does not need
    from zoo.train.run.folder import RunFolder
    from zoo.train.run.instantiate import class_of

    for run in runs:
        if (run.folder / "config.yaml").is_file():
            class_of("task", RunFolder(run.folder).read_config()["task"])  # its module declares its metrics
            break
    metric = metric_of(column)
    return metric is not None and metric.better == "higher"


def last_values(path: Path) -> dict[str, str]:
    """The last number in every column of a metrics.csv; empty when there is none."""
    values: dict[str, str] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values |= {name: value for name, value in row.items() if name and value and _is_number(value)}
    return values


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write the rows as CSV, all or nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


def show_table(rows: Sequence[dict[str, str]], column: str | None) -> None:
    """Print the rows as a table, the numbers of `column` with four digits."""
    names = list(rows[0])
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name == column else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{float(row[n]):.4f}" if n == column and row[n] else row[n] for n in names))
    wide = None if sys.stdout.isatty() else 400  # a file is not cut at 80 columns
    Console(width=wide, highlight=False).print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _folder(settings: list[str]) -> Path:
    named = [word.partition("=")[2] for word in settings if word.startswith("run_dir=")]
    return Path(named[-1].strip("'\"")) if named else fresh_folder("sweep")


def _with_folder(settings: list[str], folder: Path) -> list[str]:
    return [*(word for word in settings if not word.startswith("run_dir=")), f"run_dir={folder}"]


def _claim(folder: Path, common: list[str], config_dir: Path | None) -> None:
    """Refuse a folder that holds a sweep with other common settings: its finished runs would not be comparable."""
    text = "\n".join([*common, *([f"--config-dir {config_dir}"] if config_dir else [])]) + "\n"
    marker = folder / COMMON
    if marker.exists() and marker.read_text(encoding="utf-8") != text:
        shared = " ".join(marker.read_text(encoding="utf-8").split("\n")).strip() or "no settings in common"
        raise UsageError(f"{folder} holds a sweep with other settings ({shared}); give another run_dir")
    if not marker.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no sweep; give another run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(text, encoding="utf-8")


def _command(run: Run, common: list[str], config_dir: Path | None) -> list[str]:
    zoo = [sys.executable, "-P", "-m", "zoo"]
    if (run.folder / "config.yaml").is_file():
        return [*zoo, "resume", str(run.folder)]
    where = ["--config-dir", str(config_dir)] if config_dir else []
    quoted = "'" + str(run.folder).replace("\\", "\\\\").replace("'", "\\'") + "'"
    return [*zoo, "train", *where, *common, *run.settings, f"run_dir={quoted}"]


def _spawn(command: list[str]) -> tuple[int, bool]:
    """Run a command in a session of its own; (exit code, whether this process was told to stop meanwhile).

    The child gets each signal once and from here only, so that Ctrl-C lets it save before it ends.
    """
    told = False
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (code if code >= 0 else 128 - code), told
