"""The time that a run has trained for, carried over a resume."""

import time

__all__ = ["Clock"]


class Clock:
    """Seconds of training, over all sittings of a run.

    `now` is the value that all ranks have agreed on (schedules and limits read it); `elapsed()` is this process's own.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._before = 0.0  # seconds of earlier sittings
        self._started: float | None = None

    def start(self, before: float | None = None) -> None:
        """Begin a sitting, `before` seconds into the run (by default where the clock stands)."""
        self._before = self.now if before is None else before
        self._started = time.monotonic()
        self.now = self._before

    def elapsed(self) -> float:
        """Seconds of training until now, by this process's own clock."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)
