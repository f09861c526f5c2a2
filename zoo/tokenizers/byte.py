"""Bytes as tokens."""

import codecs
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.tokenizers.base import Stream, describe


class ByteTokenizer:
    """UTF-8 bytes as they are: ids 0-255 are bytes, 256 starts and ends a document."""

    vocab_size = 257
    eos_id = 256
    start_id = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of the text, uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; 256 and above are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream(self) -> Stream:
        """An incremental UTF-8 decoder."""
        return _ByteStream()

    def byte_lengths(self) -> np.ndarray:
        """One for each byte, zero for the document symbol."""
        return np.array([1] * 256 + [0])

    def save(self, folder: str | Path) -> None:
        """Write the description; there is nothing else to a byte tokenizer."""
        describe(folder, kind="bytes")


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(bytes([id])) if id < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
