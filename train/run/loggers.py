"""metrics.csv: one table per run, complete after any crash and any resume."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["CsvLog", "read_csv"]


class CsvLog(Logger):
    """Appends rows to a CSV file whose columns are fixed from the start.

    `size()` goes into checkpoints and `truncate(size)` cuts what was written after one, so that a resumed run neither
    loses nor repeats a row.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step", *columns]

    @property
    def name(self) -> str:
        """Lightning asks for it; the file's name says it."""
        return self.path.stem

    @property
    def version(self) -> str:
        """The run's folder is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row; names that are not columns are left out (they went to the other loggers)."""
        if not self.path.exists():
            self._append(self.columns)
        row: dict[str, float | int | None] = {**metrics, "step": step}
        self._append([_text(row.get(column)) for column in self.columns])

    def _append(self, fields: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(fields)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line.getvalue())

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @rank_zero_only
    def truncate(self, size: int) -> None:
        """Cut the file back to `size` bytes."""
        if self.size() > size:
            os.truncate(self.path, size)


def _text(value: float | int | None) -> str:
    """Six significant digits, so that a table stays readable."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, empty fields left out."""
    with path.open(encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
