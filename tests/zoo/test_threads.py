"""Waiting threads spin shortly beside other processes, and as the user says where the user says."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli import threads
from zoo.cli.threads import QUIET, SHARED, VARIABLE, idle_share, limit_spinning

# Prints what libgomp would read, at the moment when a command is about to load torch.
COMMAND = f"""
import os, sys
from importlib.abc import MetaPathFinder
from zoo import cli
from zoo.cli import threads

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("spins", os.environ.get({VARIABLE!r}))
            raise SystemExit(0)

threads.idle_share = lambda seconds: 0.5
sys.meta_path.insert(0, Watch())
cli.main(sys.argv[1:])
"""


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("idle", "spins"), [(1.0, QUIET), (0.8, QUIET), (0.5, SHARED), (0.0, SHARED), (None, SHARED)])
def test_a_busy_machine_spins_shortly(monkeypatch: pytest.MonkeyPatch, idle: float | None, spins: int) -> None:
    monkeypatch.setattr(threads, "idle_share", lambda seconds: idle)
    environment: dict[str, str] = {"OMP_NUM_THREADS": "4"}
    assert limit_spinning(environment) == (spins == QUIET)
    assert environment == {"OMP_NUM_THREADS": "4", VARIABLE: str(spins)}


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {VARIABLE: "5"}, {"OMP_NUM_THREADS": "1"}])
def test_the_users_settings_win(own: dict[str, str]) -> None:
    environment = dict(own)
    assert not limit_spinning(environment)
    assert environment == own


def test_nothing_is_set_when_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", threads)
    environment: dict[str, str] = {}
    assert not limit_spinning(environment)
    assert environment == {}


@pytest.mark.parametrize(
    "words",
    [
        ["train", "model=deltanet"], ["eval", "runs/none"], ["generate", "runs/none"], ["bench", "op=delta_rule"],
        ["profile", "model=gla"],
    ],
)  # fmt: skip
def test_it_is_said_before_torch_is_loaded(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, env={}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"spins {SHARED}\n", "")


def test_the_idle_share_is_read_between_two_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 20 1000 5 0 1 0 0 0\ncpu0 1 2 3\n")
    # 20 ticks: 4 of users, 1 of the system, 12 idle, 3 waiting for a disk; 9 of guests, which users' ticks hold already
    monkeypatch.setattr(threads.time, "sleep", lambda _: stat.write_text("cpu  104 10 21 1012 8 0 1 0 9 0\n"))
    assert idle_share(0.1, stat) == 0.75
    monkeypatch.setattr(threads.time, "sleep", lambda _: None)
    assert idle_share(0.1, stat) is None, "no tick between them"
    assert idle_share(0.1, tmp_path / "none") is None
    stat.write_text("another system\n")
    assert idle_share(0.1, stat) is None
