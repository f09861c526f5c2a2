"""Old names that keep working: the first use of each says once which name took its place."""

import functools
import sys
import warnings
from collections.abc import Mapping

__all__ = ["RENAMED_FROM", "RenamedWarning", "current_name", "renamed_from"]

RENAMED_FROM = "renamed_from"  # the key in the metadata of a config's field


class RenamedWarning(DeprecationWarning):
    """An old name was used. `zoo` prints it, although Python hides other deprecations by default."""


def renamed_from(*names: str) -> dict[str, tuple[str, ...]]:
    """The metadata of a config's field that had other names before.

    Example: `n_heads: int = field(default=4, metadata=renamed_from("heads"))`.
    """
    return {RENAMED_FROM: names}


def current_name(kind: str, name: str, former: Mapping[str, str]) -> str:
    """The name in use today for one that may be old.

    Args:
        kind: what is named, for the warning: "model", "strategy", "field of model 'gla'".
        name: what the user wrote.
        former: {old name: the name in use today}.

    Returns:
        `name` itself unless it is old; then the new name, after one RenamedWarning a process.
    """
    if name not in former:
        return name
    _warn(kind, name, former[name])
    return former[name]


@functools.cache  # one warning a process; where warnings are errors every use raises
def _warn(kind: str, old: str, new: str) -> None:
    warnings.warn(f"{kind} {old!r} is called {new!r} now; write {new!r}", RenamedWarning, stacklevel=_outside())


def _outside() -> int:
    """The stack level, seen from the caller, of the first frame that is not zoo's: the line to change is there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "zoo":
        level, frame = level + 1, frame.f_back
    return level
