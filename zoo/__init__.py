"""zoo: a modular model zoo of efficient sequence architectures."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.checkpoint import load, save
    from zoo.registry import create_model, list_models, model_info, register
    from zoo.targets import allow_package

__version__ = "0.1.0.dev0"
__all__ = ["allow_package", "create_model", "list_models", "load", "model_info", "register", "save"]

# Looked up on first use (PEP 562): `import zoo` and `zoo.list_models()` cost no torch.
_HOMES = {
    "create_model": "zoo.registry",
    "list_models": "zoo.registry",
    "model_info": "zoo.registry",
    "register": "zoo.registry",
    "allow_package": "zoo.targets",
    "load": "zoo.checkpoint",
    "save": "zoo.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
