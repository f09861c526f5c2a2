"""Waiting threads of a long run spin less while other processes need the cores.

libgomp reads GOMP_SPINCOUNT once. But it spins 100 turns only while it manages more threads than there are cores
(`gomp_throttled_spin_count_var` in its sources). A thread that has run one parallel sum, and then sleeps, brings the
count above that; when it ends, the long spinning is back. Team sizes stay as they are, and so do all sums.
"""

import os
import threading
from types import TracebackType

import torch

from zoo.cli.threads import ENOUGH_IDLE, ticks

__all__ = ["SpinWatch"]

PERIOD = 1.0  # seconds between two looks at the machine
CALM = 5  # looks in a row at a quiet machine before the long spinning is back
GRAIN = 32_768  # elements of a sum that one thread of torch takes at least: at::internal::GRAIN_SIZE


class SpinWatch:
    """A context: inside, waiting threads spin shortly whenever others use over a quarter of the cores' time.

    Two Xeon cores at load 4 to 6, two busy loops beside it, a step of the tiny DeltaNet, medians of 8 rounds in turns,
    as shares of one thread's speed: 10,000 turns 0.57, the same with this 1.51, 100 turns from the start 1.16.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._calm = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="zoo-spins", daemon=True)
        self._holders: list[threading.Thread] = []

    @staticmethod
    def works() -> bool:
        """Whether torch's threads are libgomp's, there are several, and no limit of the user's counts them."""
        counted = {"OMP_THREAD_LIMIT", "OMP_DYNAMIC"} & set(os.environ)
        return "OpenMP" in torch.__config__.parallel_info() and torch.get_num_threads() > 1 and not counted

    @property
    def is_short(self) -> bool:
        """Whether waiting threads spin shortly now."""
        return bool(self._holders)

    def __enter__(self) -> "SpinWatch":
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        quiet = 0
        try:
            before = ticks(), _own_seconds()
            while not self._over.wait(PERIOD):
                after = ticks(), _own_seconds()
                if share_of_others(before, after) > 1 - ENOUGH_IDLE:
                    quiet = 0
                    self.shorten()
                else:
                    quiet += 1
                    if quiet >= CALM:
                        self.lengthen()
                before = after
        except (OSError, ValueError):  # no /proc/stat: nothing is known of others
            pass
        finally:
            self.lengthen()

    def shorten(self) -> None:
        """Bring libgomp's threads above the number of cores, so that they sleep early."""
        if self._holders:
            return
        self._calm.clear()
        threads = torch.get_num_threads()
        self._holders = [
            threading.Thread(target=self._hold, args=(threads,), name="zoo-spins-hold", daemon=True)
            for _ in range(max(1, len(os.sched_getaffinity(0)) // threads))
        ]
        for holder in self._holders:
            holder.start()

    def lengthen(self) -> None:
        """Let the threads above go."""
        self._calm.set()
        for holder in self._holders:
            holder.join()
        self._holders = []

    def _hold(self, threads: int) -> None:
        torch.ones(GRAIN * threads).sum()  # makes this thread's team
        self._calm.wait()


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def share_of_others(before: tuple[list[int], float], after: tuple[list[int], float]) -> float:
    """The share of all cores' time, in [0, 1], that other processes used between two moments.

    Args:
        before, after: the ticks of all cores (`ticks`), and the CPU seconds of this process.
    """
    spent = [b - a for a, b in zip(before[0], after[0], strict=True)]
    if sum(spent) <= 0:
        return 0.0
    ours = (after[1] - before[1]) * os.sysconf("SC_CLK_TCK")
    return min(1.0, max(0.0, (sum(spent) - spent[3] - spent[4] - ours) / sum(spent)))
