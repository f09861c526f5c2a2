"""Hydra groups, one folder each; and what can be chosen, read from the file names alone."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent
GROUPS = ("model", "data", "task", "optim", "trainer", "strategy", "memory", "logger", "experiment")


def choices(extra: Iterable[Path] = ()) -> dict[str, list[str]]:
    """{group: the names of its YAML files}, also from further folders that are laid out like this one."""
    found: dict[str, list[str]] = {}
    for group in GROUPS:
        files = {file.stem for root in (ROOT, *extra) for file in (root / group).glob("*.yaml")}
        found[group] = sorted(files)
    return found
