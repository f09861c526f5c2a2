"""The settings that a class takes from a config: their names, types, defaults and ranges.

They are the parameters of its constructor that plain values can fill. To ask a class, it must be imported, and with it
torch and Lightning, which takes seconds. So an index keeps the answers of zoo's own classes, a file beside the YAML
files that name the class: configs/GROUP/CLASS.json. `python -m zoo.registry` writes it; a test says when it is old.
"""

import dataclasses
import enum
import functools
import inspect
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zoo._types import is_opaque, spell
from zoo.configs import DECODER, GROUPS, ROOT
from zoo.files import write_text
from zoo.ranges import Range, ranges_of
from zoo.registry import resolve
from zoo.targets import TARGET

__all__ = [
    "NO_DEFAULT",
    "Setting",
    "as_plain",
    "build_index",
    "indexed",
    "is_plain",
    "settings_of",
    "write_index",
]


class _Mark(enum.Enum):
    NO_DEFAULT = enum.auto()


NO_DEFAULT = _Mark.NO_DEFAULT  # None is a default
OPEN = "**"  # the class takes any further setting


@dataclass(frozen=True)
class Setting:
    """One key that a class takes: its type as `zoo._types` spells it, its default or NO_DEFAULT, its range."""

    type: str
    default: Any = NO_DEFAULT
    range: Range | None = None


def settings_of(owner: Any) -> dict[str, Setting]:
    """The settings of a class or function; parameters for objects (a module, a callback) are not the user's to give."""
    init = inspect.unwrap(getattr(owner, "__init__") if isinstance(owner, type) else owner)  # noqa: B009 - may be inherited
    hints = _hints(init)
    declares: Any = owner if dataclasses.is_dataclass(owner) else init
    ranges = ranges_of(declares) if hints else {}
    settings = {}
    # of a class, what its constructor takes: one that chooses among classes has a `__new__` that takes anything
    takes = list(inspect.signature(init).parameters.items())[1 if isinstance(owner, type) else 0 :]
    for name, parameter in takes:
        if parameter.kind is parameter.VAR_KEYWORD:
            settings[OPEN] = Setting("Any")
        elif parameter.kind is not parameter.VAR_POSITIONAL and not is_opaque(hints.get(name, "Any")):
            default = NO_DEFAULT if parameter.default is parameter.empty else parameter.default
            settings[name] = Setting(hints.get(name, "Any"), default, ranges.get(name))
    return settings


def indexed(group: str, target: object) -> dict[str, Setting] | None:
    """The settings of a group's class as the index has them; None for a class that is not in it. Imports nothing."""
    path = _files().get((group, target)) if isinstance(target, str) else None
    if path is None:
        return None
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Setting(e["type"], e.get("default", NO_DEFAULT), Range(**e["range"]) if "range" in e else None)
        for name, e in entries.items()
    }


def build_index() -> dict[Path, str]:
    """{file: its text} for every class of zoo that a YAML file of the configs names; imports them all."""
    texts = {}
    for group in (*GROUPS, DECODER):
        for path in (ROOT / group).glob("*.yaml"):
            target = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(TARGET, "")
            if target.startswith("zoo."):
                entries = {name: _entry(setting) for name, setting in settings_of(resolve(target)).items()}
                texts[ROOT / group / f"{target}.json"] = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    return texts


def write_index() -> list[Path]:
    """Write the files that are not up to date, and remove those of classes that no YAML file names; their paths."""
    texts = build_index()
    changed = [path for path in ROOT.glob("*/*.json") if path not in texts]
    for path in changed:
        path.unlink()
    return changed + [path for path, text in texts.items() if write_text(path, text)]


def is_plain(value: Any) -> bool:
    """Whether YAML can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str | Path)


def as_plain(value: Any) -> Any:
    """A value as YAML holds it: tuples as lists, paths as text."""
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: as_plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _files() -> Mapping[tuple[str, str], Path]:
    return {(path.parent.name, path.stem): path for path in ROOT.glob("*/*.json")}


def _hints(init: Any) -> dict[str, str]:
    """{parameter: its type}, as far as the annotations can be read."""
    try:
        return {name: spell(hint) for name, hint in typing.get_type_hints(init).items()}
    except NameError:  # a name imported for type checkers only, as in Lightning's loggers
        return {}


def _entry(setting: Setting) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": setting.type}
    if setting.default is not NO_DEFAULT and is_plain(setting.default):
        entry["default"] = as_plain(setting.default)
    if setting.range is not None:
        entry["range"] = setting.range.as_plain()
    return entry
