"""Files are there in full or not at all, and a cache that cannot be written costs time only."""

from pathlib import Path
from typing import BinaryIO

import pytest

from zoo.files import cache_folder, keep_in_cache, write_atomically


def full(file: BinaryIO) -> None:
    file.write(b"half of")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, full)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o400


def test_a_full_cache_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No space left on device.*set ZOO_CACHE"):
        keep_in_cache(tmp_path / "file", full)
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("ZOO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/zoo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/zoo")
    monkeypatch.setenv("ZOO_CACHE", "/mine")
    assert cache_folder() == Path("/mine")
