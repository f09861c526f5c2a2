"""The resident memory of this process, Linux only."""

from pathlib import Path


def reset() -> None:
    """Forget the peak so far. It outlives fork and exec, so that a child would start with its parent's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The highest resident memory since `reset`, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
