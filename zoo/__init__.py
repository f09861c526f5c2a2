"""zoo: a modular model zoo of efficient sequence architectures."""

__version__ = "0.1.0.dev0"
