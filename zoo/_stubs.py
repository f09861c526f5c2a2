"""What type checkers read of packages whose public names are found, `zoo.ops` and others: their stubs."""

import importlib
from pathlib import Path
from types import FunctionType, ModuleType

from zoo.files import write_text

__all__ = ["build", "write"]

PACKAGES = ("zoo.ops", "zoo.layers", "zoo.decoding", "zoo.codecs")


def build(package: ModuleType) -> str:
    """The text of a package's stub: each public name, imported from the module that defines it."""
    public: dict[str, FunctionType | type] = {name: vars(package)[name] for name in package.__all__}
    lines = sorted(f"from {value.__module__} import {name} as {name}" for name, value in public.items())
    return "\n".join(["# Written by `python -m zoo.registry`.", *lines, ""])


def write() -> list[Path]:
    """Write the stubs that are not up to date; the paths of those that changed."""
    packages = [importlib.import_module(name) for name in PACKAGES]
    return [stub_of(package) for package in packages if write_text(stub_of(package), build(package))]


def stub_of(package: ModuleType) -> Path:
    """Where a package's stub lies."""
    return Path(package.__path__[0]) / "__init__.pyi"
