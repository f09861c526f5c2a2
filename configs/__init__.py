"""Hydra groups, one folder each; and what can be chosen, read from the file names alone."""

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent
GROUPS = ("model", "data", "task", "optim", "trainer", "strategy", "memory", "logger", "experiment")
DECODER = "decoder"  # a group of its own: it is of `zoo generate`, not of a run
# {group: {old name of a choice: its name today}}; an old one keeps working and says once what to write.
RENAMED: dict[str, dict[str, str]] = {}
# {group: {setting: its values}}; a choice NAME whose file holds the setting is also there as NAME_VALUE.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {"strategy": {"weights": ("ddp", "fsdp")}}


def variants(group: str) -> dict[str, dict[str, str]]:
    """{NAME_VALUE: {group: NAME, "group.setting": VALUE}} for zoo's own choices, but for the value in the file."""
    names = {}
    for setting, values in VARIANTS.get(group, {}).items():
        for path in sorted((ROOT / group).glob("*.yaml")):
            own = re.search(rf"^{setting}: *(\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            for value in values if own else ():
                if own and value != own[1]:
                    names[f"{path.stem}_{value}"] = {group: path.stem, f"{group}.{setting}": value}
    return names


def choices(extra: Iterable[Path] = ()) -> dict[str, list[str]]:
    """{group: the names of its YAML files}, also from further folders that are laid out like this one."""
    found: dict[str, list[str]] = {}
    for group in (*GROUPS, DECODER):
        files = {file.stem for root in (ROOT, *extra) for file in (root / group).glob("*.yaml")}
        found[group] = sorted(files)
    return found
