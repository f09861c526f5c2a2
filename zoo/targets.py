"""The classes that a config may name by `_target_`: the only place where the text of a config becomes code.

A config comes from a command line or from the folder of a run, which may be anybody's. So a name is judged before
anything is imported, since an import runs code, and the class once more after it:

- zoo's own classes, each group's from its own module (`KINDS`);
- classes of other libraries that zoo's own YAML files name, such as the loggers of configs/logger;
- classes of packages that the user trusts: those with a model in the entry-point group zoo.models, those that have
  called `zoo.register` in this process, those given to `allow_package`, and those listed in ZOO_ALLOW_PACKAGES.
"""

import functools
import importlib
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from zoo.configs import ROOT
from zoo.errors import UsageError
from zoo.registry import packages_with_models

TARGET = "_target_"
ALLOWED = "ZOO_ALLOW_PACKAGES"  # names of packages, separated by commas
RESERVED = (TARGET, "_partial_", "_recursive_", "_convert_", "_args_")  # what Hydra gives a meaning of its own


@dataclass(frozen=True)
class Kind:
    """What a group of the config holds.

    Attributes:
        base: the class that every class of this group is, or inherits from.
        home: the module or package of zoo that has its own; None where zoo has none.
    """

    base: str
    home: str | None


KINDS: Mapping[str, Kind] = {
    "data": Kind("lightning.pytorch.core.datamodule.LightningDataModule", "zoo.train.data"),
    "task": Kind("zoo.train.tasks.task.Task", "zoo.train.tasks"),
    "optim": Kind("zoo.train.optim.Recipe", "zoo.train.optim"),
    "trainer": Kind("zoo.train.run.trainer.TrainerConfig", "zoo.train.run.trainer"),
    "strategy": Kind("lightning.pytorch.strategies.strategy.Strategy", "zoo.train.strategies"),
    "memory": Kind("zoo.train.memory.choose.MemoryConfig", "zoo.train.memory"),
    "decoder": Kind("zoo.decoding.decoder.Decoder", "zoo.decoding.decoders"),
    "logger": Kind("lightning.pytorch.loggers.logger.Logger", None),
}

# {module of before: its name today}: the folders of old runs name classes by where they lay then.
MOVED: Mapping[str, str] = {
    "zoo.train.data.copying": "zoo.train.data.synthetic.copying",
    "zoo.train.data.digits": "zoo.train.data.images.digits",
    "zoo.train.data.documents": "zoo.train.data.text.documents",
    "zoo.train.data.hub": "zoo.train.data.text.hub",
    "zoo.train.data.induction_heads": "zoo.train.data.synthetic.induction_heads",
    "zoo.train.data.mqar": "zoo.train.data.synthetic.mqar",
    "zoo.train.data.pydocs": "zoo.train.data.text.pydocs",
    "zoo.train.data.state_tracking": "zoo.train.data.synthetic.state_tracking",
    "zoo.train.data.text_files": "zoo.train.data.text.text_files",
    "zoo.train.trainer": "zoo.train.run.trainer",
}

_allowed: set[str] = set()


def allow_package(name: str) -> None:
    """Let configs name classes of a package, for the rest of this process.

    Args:
        name: a top-level package such as "mypackage", installed or on the path. On a command line the variable
            ZOO_ALLOW_PACKAGES=mypackage,another does the same. A package with a model of zoo needs neither.

    Raises:
        UsageError: not the name of a top-level package.
    """
    if not name.isidentifier():
        raise UsageError(
            f"a package is allowed by its top-level name, got {name!r}; give the part before the first dot"
        )
    _allowed.add(name)


def trusted_packages() -> set[str]:
    """The packages, besides zoo, whose classes a config may name."""
    listed = {name.strip() for name in os.environ.get(ALLOWED, "").split(",")} - {""}
    return (_allowed | listed | packages_with_models()) - {"zoo"}


def current_target(target: object) -> object:
    """The name of a class today, for one that may lie in another module since; anything else comes back as it is."""
    module, dot, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    return f"{MOVED[module]}{dot}{name}" if module in MOVED else target


def load_class(group: str, target: object) -> type:
    """The class that `GROUP._target_` names. Nothing is imported before its name is allowed.

    Args:
        group: one of `KINDS`.
        target: "package.module.Class".

    Raises:
        UsageError: the name is not one that may stand there, cannot be imported, or is of another kind.
    """
    key = f"{group}.{TARGET}"
    if group not in KINDS:
        raise UsageError(f"{group} names no class, got {key}={target!r}; {' and '.join(KINDS)} do")
    target = current_target(target)
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target, re.ASCII):
        raise UsageError(f"{key} must be the dotted name of a class, got {target!r}; {_choices(group)}")
    module, _, name = target.rpartition(".")
    if not _may_import(group, module, target):
        raise UsageError(
            f"{key} must name a class of zoo or of a package that you trust, and {target} is none, so it was not "
            f"imported; {_choices(group)}, or add {target.partition('.')[0]} to {ALLOWED} if you know what it does"
        )
    try:
        owner: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{key}: {target} cannot be imported ({first_line(error)}); {_choices(group)}") from error
    if not isinstance(owner, type) or not _may_import(group, owner.__module__, target):
        raise UsageError(f"{key} must name a class where it is defined, and {target} is none; {_choices(group)}")
    base = KINDS[group].base
    if base not in {f"{parent.__module__}.{parent.__qualname__}" for parent in owner.__mro__}:
        raise UsageError(f"{key} must name a {base.rpartition('.')[2]}, and {target} is none; {_choices(group)}")
    if inspect.isabstract(owner):
        raise UsageError(f"{key} must name a class that can be made, and {target} is only a base; {_choices(group)}")
    return owner


def refuse_nested(config: Mapping[str, object]) -> None:
    """Refuse the keys that Hydra would act on anywhere but `_target_` at the top of a group: nothing here reads them.

    Raises:
        UsageError: there is one.
    """
    for group, section in config.items():
        _refuse_reserved(group, section, allowed=TARGET if group in KINDS else "")


def _refuse_reserved(where: str, value: object, allowed: str = "") -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in RESERVED and key != allowed:
                raise UsageError(
                    f"{where}.{key} has no meaning: only a group of the config names a class, by {TARGET}; take it out"
                )
            _refuse_reserved(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_reserved(where, item)


def _may_import(group: str, module: str, target: str) -> bool:
    """Whether a module may be imported for a class of this group."""
    package, _, _ = module.partition(".")
    if package == "zoo":
        home = KINDS[group].home
        return home is not None and f"{module}.".startswith(f"{home}.")
    if "__main__" in module.split(".")[1:]:  # importing the __main__ of a package runs its program
        return False
    return package in trusted_packages() or target in _shipped(group)


@functools.cache
def _shipped(group: str) -> frozenset[str]:
    """The targets of zoo's own YAML files for a group."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / group).glob("*.yaml"))]
    return frozenset(str((yaml.safe_load(text) or {}).get(TARGET)) for text in texts)


def _choices(group: str) -> str:
    names = ", ".join(path.stem for path in sorted((ROOT / group).glob("*.yaml")))
    return f"{group}=NAME chooses from {names}"


def first_line(error: BaseException) -> str:
    """What an error says, without what follows the first line of it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
