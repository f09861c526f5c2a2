"""From a section of a config to the object that it names: the one place where settings become objects."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from zoo.errors import UsageError, UserError
from zoo.targets import KINDS, TARGET, load_class

__all__ = ["class_of", "instantiate", "refused_settings", "settings_of", "strategy_of"]


def class_of(group: str, section: Mapping[str, Any]) -> Any:
    """The class that a section names, which `zoo.targets` allows; the group's own where the section names none.

    Returns:
        a class that is, or inherits from, `zoo.targets.KINDS[group].base`.

    Raises:
        UsageError: it is not allowed, or there is none.
    """
    base = KINDS[group].base
    return load_class(group, section.get(TARGET, base if base.startswith("zoo.") else None))


def instantiate(group: str, section: Mapping[str, Any], *given: Any, **unless_set: Any) -> Any:
    """The object that a section names, made with the section's settings.

    Args:
        group: one of `zoo.targets.KINDS`.
        section: the settings, and the class in `_target_`.
        given: arguments before them, such as the model of a task.
        unless_set: settings for where the section has none; only those that the class takes are used.

    Returns:
        an object of the group's kind, see `class_of`.

    Raises:
        UsageError: a class that is not allowed, or a setting that the class refuses.
    """
    owner = class_of(group, section)
    takes = inspect.signature(owner).parameters if unless_set else {}
    defaults = {name: value for name, value in unless_set.items() if name in takes}
    with refused_settings():
        return owner(*given, **{**defaults, **settings_of(section)})


def strategy_of(section: Any) -> Any:
    """Lightning's `strategy`: an instance of what the config names, a name, or "auto"."""
    if isinstance(section, Mapping):
        return instantiate("strategy", section) if TARGET in section else "auto"
    return section or "auto"


@contextmanager
def refused_settings() -> Iterator[None]:
    """Around a constructor that takes a group's settings: what it refuses is a UsageError, and the exit code is 2."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from error


def settings_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a section holds beside its `_target_`."""
    return {key: value for key, value in section.items() if key != TARGET}
