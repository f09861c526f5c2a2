"""Hydra groups, one folder each; and what can be chosen, read from the file names alone."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent
GROUPS = ("model", "data", "task", "optim", "trainer", "strategy", "memory", "logger", "experiment")
# {group: {old name of a choice: its name today}}; an old one keeps working and says once what to write.
RENAMED: dict[str, dict[str, str]] = {}


def choices(extra: Iterable[Path] = ()) -> dict[str, list[str]]:
    """{group: the names of its YAML files}, also from further folders that are laid out like this one."""
    found: dict[str, list[str]] = {}
    for group in GROUPS:
        files = {file.stem for root in (ROOT, *extra) for file in (root / group).glob("*.yaml")}
        found[group] = sorted(files)
    return found
