"""What a long command is at: one live line on a terminal, plain lines in a file."""

import shutil
import time
from types import TracebackType
from typing import TextIO

__all__ = ["StatusLine"]


class StatusLine:
    """Called with what happens now; a context whose end takes the live line away.

    Every text has the time since the command began, [minutes:seconds], in front.

    Args:
        stream: where to write; standard error, so that tables in standard output stay alone.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.began = time.monotonic()

    def __call__(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        line = f"[{minutes}:{seconds:02d}] {text}"
        if self.stream.isatty():
            room = shutil.get_terminal_size().columns - 1  # a full line would wrap, and could not be taken away
            print(f"\r\033[K{line[:room]}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)
