"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, write a checkpoint, leave with exit code 130."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(Exception):
    """The run was asked to stop; `training` had begun or not, and its last step is `saved` or not."""

    def __init__(self, *, training: bool, saved: bool) -> None:
        super().__init__("interrupted")
        self.training = training
        self.saved = saved


class Interrupts:
    """While entered, the first of these signals only sets `requested`; a second one ends the process at once.

    SIGUSR1 is what clusters are told to send some time before the limit of a job.

    Before training has begun there is nothing to finish: `Interrupted` is raised right away until `defer()`.
    """

    SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False  # the other ranks know, too
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def defer(self) -> None:
        """From now on somebody looks at `requested` after every step."""
        self._deferred = True
        for number in self._previous:  # Lightning has put its own handler around ours meanwhile
            if not self.requested:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._deferred:
            raise Interrupted(training=False, saved=False)
