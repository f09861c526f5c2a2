"""Files that are either there in full or not at all, and the folder for what can be made again."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where derived files are kept: ZOO_CACHE, else XDG_CACHE_HOME/zoo, else ~/.cache/zoo."""
    if chosen := os.environ.get("ZOO_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zoo"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it to `path`; a failure leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> bool:
    """Write a text file in full or not at all; False where it already holds this text."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomically(path, lambda file: file.write(text.encode()))
    return True


def keep_in_cache(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """As `write_atomically`, for a file that only saves time: where it cannot be written, say so and go on."""
    try:
        write_atomically(path, write)
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error.strerror}), so the same work is done again next time; "
            "set ZOO_CACHE to a folder with room",
            stacklevel=2,
        )
