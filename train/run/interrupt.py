"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: finish the step, write a checkpoint, leave with exit code 130."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Interrupts"]

HANG_UP = "SIGHUP"
HEEDED = ("SIGINT", "SIGTERM", HANG_UP, "SIGUSR1")


class Interrupted(Exception):
    """The run was asked to stop; `training` had begun or not, and its last step is `saved` or not."""

    def __init__(self, *, training: bool, saved: bool) -> None:
        super().__init__("interrupted")
        self.training = training
        self.saved = saved


class Interrupts:
    """While entered, the first of these signals only sets `requested`; a second one ends the process at once.

    SIGUSR1 is what clusters are told to send some time before the limit of a job. SIGHUP comes when the terminal is
    closed: what is printed afterwards goes nowhere, and log.txt has it. Where it is ignored it stays ignored, so that
    `nohup zoo train` outlives its terminal.

    Before training has begun there is nothing to finish: `Interrupted` is raised right away until `defer()`.
    """

    SIGNALS = tuple(s for s in signal.Signals if s.name in HEEDED)  # those that this system has

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False  # the other ranks know, too
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in self.SIGNALS if s.name != HANG_UP or signal.getsignal(s) is not signal.SIG_IGN]
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            self._previous = {s: signal.signal(s, self._handle) for s in heeded}
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
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if signal.Signals(number).name == HANG_UP:
            self._print_nowhere()
        if not self._deferred:
            raise Interrupted(training=False, saved=False)

    def _print_nowhere(self) -> None:
        """Writing to a terminal that is gone is an error; it must not end the run before its checkpoint is written."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
