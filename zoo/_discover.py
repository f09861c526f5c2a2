"""What a folder says already is found in it, not listed: operators, mixers, models, formats."""

import importlib
import pkgutil
from types import ModuleType

__all__ = ["load_leaves", "load_modules", "load_packages", "public_names"]


def load_modules(package: ModuleType) -> list[ModuleType]:
    """Import the modules of one package whose names have no leading underscore, sorted by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def load_packages(package: ModuleType, *, depth: int) -> list[ModuleType]:
    """Import the packages that lie `depth` levels below one, sorted by dotted name."""
    return [importlib.import_module(name) for name in _below(package, depth)]


def load_leaves(package: ModuleType, leaf: str, *, depth: int) -> list[ModuleType]:
    """Import the modules of one name, as "spec", that the packages `depth` levels below one hold."""
    homes = [name for name, inner in _below(package, depth).items() if leaf in inner]
    return [importlib.import_module(f"{name}.{leaf}") for name in homes]


def public_names(module: ModuleType) -> list[str]:
    """The `__all__` of a module; empty where it has none."""
    return list(getattr(module, "__all__", ()))


def _below(package: ModuleType, depth: int) -> dict[str, set[str]]:
    """{dotted name: names of its modules} of the packages `depth` levels down; none is imported."""
    level = {package.__name__: list(package.__path__)}
    for _ in range(depth):
        level = {
            f"{name}.{info.name}": [f"{path}/{info.name}" for path in paths]
            for name, paths in level.items()
            for info in pkgutil.iter_modules(paths)
            if info.ispkg
        }
    return {name: {info.name for info in pkgutil.iter_modules(level[name])} for name in sorted(level)}
