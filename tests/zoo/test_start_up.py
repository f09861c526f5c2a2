"""What a command does before its own work begins."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zoo.cli.imports import collector_paused

# Prints whether the collector was ever on while torch was imported, and whether it is on afterwards.
COMMAND = """
import gc, sys
from importlib.abc import MetaPathFinder
from zoo import cli

on = []

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("torch."):
            on.append(gc.isenabled())

sys.meta_path.insert(0, Watch())
code = cli.main(sys.argv[1:])
heavy = {"hydra", "lightning", "torchmetrics", "transformers"} & set(sys.modules)
print("during", any(on), "after", gc.isenabled(), "code", code, "heavy", heavy or None, file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


def test_the_collector_rests_and_comes_back() -> None:
    gc.enable()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no"), collector_paused():
        raise ValueError("no")
    assert gc.isenabled()
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled(), "it was off before"


def test_show_imports_without_the_collector() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "show", "gla"], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr) == (0, "during False after True code 0 heavy None\n"), done.stderr
    assert "FLOPs per token" in done.stdout
