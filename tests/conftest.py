"""Settings for every test: fresh memory is NaN, kernels run in the interpreter without a GPU."""

import os
import sys
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # what several test files share
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any zoo.ops import: triton reads it when a kernel is defined


def _no_kernels() -> str:
    """Why Triton kernels cannot run here, or nothing."""
    try:
        triton = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "triton is not installed"
    numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
    if not torch.cuda.is_available() and triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton before 3.7 cannot loop up to a loaded number with numpy 2.4 or newer"
    return ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="of the tests marked `everything`, part K of N (0 <= K < N)")


def _keep_part(config: pytest.Config, items: list[pytest.Item], part: str) -> None:
    """Leave out the other parts: functions are dealt by a hash of their names, so that one file's come in turns."""
    which, parts = (int(number) for number in part.split("/"))
    if not 0 <= which < parts:
        raise pytest.UsageError(f"--part is K/N with 0 <= K < N; got {part}")

    def is_other(item: pytest.Item) -> bool:
        function = item.nodeid.partition("[")[0]
        return "everything" in item.keywords and zlib.crc32(function.encode()) % parts != which

    config.hook.pytest_deselected(items=[item for item in items if is_other(item)])
    items[:] = [item for item in items if not is_other(item)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part: str | None = config.getoption("--part")
    if part is not None:
        _keep_part(config, items, part)
    missing = {"gpu": "" if torch.cuda.is_available() else "needs a CUDA device", "kernels": _no_kernels()}
    for item in items:
        for mark, reason in missing.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> object:
    """torch.empty returns NaN on the CPU, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
