"""A run that others disturb spins less, with the same sums."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from zoo.cli import runs, spins
from zoo.cli.spins import SpinWatch, share_of_others

HZ = os.sysconf("SC_CLK_TCK")

# How fast two threads are beside busy loops is no matter of a test. Their sums and their number are.
SUMS = """
import torch
from zoo.cli.spins import SpinWatch
torch.manual_seed(0)
x = torch.randn(1 << 20)
assert SpinWatch.works()
watch = SpinWatch()
before = x.sum(), torch.get_num_threads()
watch.shorten()
assert watch.is_short
during = x.sum(), torch.get_num_threads()
watch.lengthen()
assert not watch.is_short
after = x.sum(), torch.get_num_threads()
assert before == during == after, (before, during, after)
"""


def seen(user: float, idle: float, own: float) -> tuple[list[int], float]:
    """What a look sees: seconds of users, idle seconds, and the process's own."""
    return [round(user * HZ), 0, 0, round(idle * HZ), 0, 0, 0, 0], own


@pytest.mark.parametrize(
    ("user", "idle", "own", "share"), [(2, 0, 2, 0.0), (2, 0, 1, 0.5), (1, 1, 1, 0.0), (1, 1, 0, 0.5), (2, 0, 3, 0.0)]
)
def test_what_others_use_is_what_is_neither_idle_nor_ours(user: float, idle: float, own: float, share: float) -> None:
    assert share_of_others(seen(0, 0, 0), seen(user, idle, own)) == pytest.approx(share)
    assert share_of_others(seen(1, 1, 1), seen(1, 1, 1)) == 0.0


def test_sums_and_threads_stay_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUMS], capture_output=True, text=True, env={"OMP_NUM_THREADS": "2"}, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [0.0]
    monkeypatch.setattr(spins, "PERIOD", 0.01)
    monkeypatch.setattr(spins, "share_of_others", lambda before, after: others[0])

    def reached(state: bool) -> bool:
        deadline = time.monotonic() + 30
        while watch.is_short != state and time.monotonic() < deadline:
            time.sleep(0.01)
        return watch.is_short == state

    with SpinWatch() as watch:
        time.sleep(0.1)
        assert not watch.is_short
        others[0] = 0.5
        assert reached(True)
        others[0] = 0.1
        assert reached(False)
        others[0] = 0.5
        assert reached(True)
    assert not watch.is_short
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zoo-spins")]


def test_a_run_is_watched_where_its_spinning_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for works in (True, False):
        monkeypatch.setattr(SpinWatch, "works", staticmethod(lambda works=works: works))
        assert isinstance(runs._spinning_less_beside_others(True), SpinWatch) == works
        assert not isinstance(runs._spinning_less_beside_others(False), SpinWatch)


@pytest.mark.parametrize("own", [{"OMP_NUM_THREADS": "1"}, {"OMP_THREAD_LIMIT": "4"}, {"OMP_DYNAMIC": "true"}])
def test_it_keeps_away_where_it_could_change_a_team(own: dict[str, str]) -> None:
    program = "from zoo.cli.spins import SpinWatch; print(SpinWatch.works())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2", **own},
        timeout=120,
    )
    assert re.fullmatch("False\n", done.stdout), done.stderr
