"""How long the threads of a computing process spin while they wait; libgomp, torch's OpenMP on Linux, is told before
torch is loaded."""

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["QUIET", "SHARED", "VARIABLE", "idle_share", "limit_spinning", "ticks"]

VARIABLE = "GOMP_SPINCOUNT"
# Turns of libgomp's waiting loop before a thread sleeps. Its own 300,000 last milliseconds, which another process could
# use. Two Xeon cores, tiny DeltaNet, benchmarks/busy_machine.py, shares of one thread's speed. Beside other work (load
# 7 to 20): 300,000 turns 0.05 to 0.36, 10,000 turns 0.5 to 1.6, 4,000 turns 0.5 to 1.2, 1,000 turns 0.9 to 2.1. In its
# quiet moments the same machine lost 2 % with 10,000 turns and a third with 1,000: waking a thread takes long.
SHARED, QUIET = 1_000, 10_000
ENOUGH_IDLE = 0.75  # of all cores: one of two is busy at 0.5
STAT = Path("/proc/stat")
SAMPLE = 0.1  # seconds; /proc/stat counts hundredths


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set libgomp's spinning by how idle this machine is: long on a quiet one, short beside other processes.

    Returns:
        whether it was set to long, so that `zoo.cli.spins` may shorten it while others need the machine.

    The number of threads stays as it is, for sums depend on it. Nothing is set where the user has said how to wait
    (OMP_WAIT_POLICY, GOMP_SPINCOUNT), where there is one thread, or where torch is loaded already.
    """
    theirs = "OMP_WAIT_POLICY" in environment or VARIABLE in environment or environment.get("OMP_NUM_THREADS") == "1"
    if theirs or "torch" in sys.modules:
        return False
    idle = idle_share(SAMPLE)
    is_quiet = idle is not None and idle >= ENOUGH_IDLE
    environment[VARIABLE] = str(QUIET if is_quiet else SHARED)
    return is_quiet


def idle_share(seconds: float, stat: Path = STAT) -> float | None:
    """The share of all cores' time, in [0, 1], that nobody uses in the next `seconds`; None where no /proc says so."""
    try:
        before = ticks(stat)
        time.sleep(seconds)
        after = ticks(stat)
    except (OSError, ValueError):
        return None
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return (spent[3] + spent[4]) / sum(spent) if sum(spent) > 0 else None  # idle, and waiting for a disk


def ticks(stat: Path = STAT) -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal of all cores: proc_stat(5). Guests count as users there."""
    name, *numbers = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
    if name != "cpu" or len(numbers) < 8:
        raise ValueError(f"{stat} does not begin with the ticks of all cores")
    return [int(number) for number in numbers[:8]]
