"""What every tokenizer is, and the file that says which one a folder holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.errors import UserError
from zoo.files import write_atomically

DESCRIPTION = "zoo_tokenizer.json"  # what kind of tokenizer a saved folder holds


class Stream(Protocol):
    """Decodes one id at a time and never hands out part of a character."""

    def push(self, id: int) -> str:
        """The text that became certain with this id; often one word, sometimes nothing yet."""
        ...

    def finish(self) -> str:
        """What is still held back when no more ids come: the replacement character for a broken one."""
        ...


class Tokenizer(Protocol):
    """What data, checkpoints and generation expect of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int:
        """The id between documents: the end of one and the start of the next."""
        ...

    @property
    def start_id(self) -> int:
        """The id that a generated document starts with: eos_id, or what a foreign model was trained with."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without start or end symbols."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as a one-dimensional array of integers."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special symbols give none, broken UTF-8 gives replacement characters."""
        ...

    def stream(self) -> Stream:
        """A new incremental decoder; all it returns, joined, is `decode` of all it was given."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (vocab_size,) int64; special symbols stand for 0."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write everything that `load` needs into the folder."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file, empty where there is no file.

    Raises:
        UserError: it is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"a .json file must be JSON; {str(path)!r} is not ({error}): copy the file again") from error
    return content if isinstance(content, dict) else {}


def describe(folder: str | Path, **description: str) -> None:
    """Write the file that says what kind of tokenizer a folder holds."""
    content = json.dumps({"format": "zoo-tokenizer", "version": 1, **description}, indent=2).encode() + b"\n"
    write_atomically(Path(folder) / DESCRIPTION, lambda file: file.write(content))
