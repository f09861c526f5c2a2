"""What a codec is: samples become ids of a vocabulary, in one stream or several side by side, and come back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from zoo.errors import UserError
from zoo.files import write_atomically

__all__ = ["CODECS", "DESCRIPTION", "Codec", "Codes", "StoredCodec", "padded", "register_codec"]

FORMAT, VERSION = "zoo-codec", 1
DESCRIPTION, TENSORS = "codec.json", "codec.safetensors"

Kind = TypeVar("Kind", bound="type[Any]")
CODECS: dict[str, "type[Any]"] = {}


class Codes(NamedTuple):
    """Samples as ids.

    ids: (B, L) int64, with several streams (B, L, streams); zeros behind a sample's own.
    lengths: (B,) int64, steps of each sample.
    """

    ids: Tensor
    lengths: Tensor


@runtime_checkable
class Codec(Protocol):
    """What data, checkpoints and decoders expect of a codec. It is fitted once, and frozen from then on."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of any stream."""
        ...

    @property
    def streams(self) -> int:
        """Ids of one step: 1, or the number of codebooks or slots."""
        ...

    def fit(self, samples: Iterable[Any]) -> Self:
        """Learn from samples whatever is learnt, and freeze it; a frozen codec refuses."""
        ...

    def encode(self, samples: Sequence[Any]) -> Codes:
        """The samples as ids."""
        ...

    def decode(self, codes: Codes) -> list[Any]:
        """The samples of the ids, as near as the codec can."""
        ...

    def errors(self, samples: Sequence[Any]) -> Mapping[str, float]:
        """What the round trip costs, by the names of the measures; 0 is a perfect one."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `zoo.codecs.load` needs into the folder: JSON and safetensors, no code."""
        ...


def register_codec(name: str) -> Callable[[Kind], Kind]:
    """Give a codec its name: a decorator on its class, which has `load(folder)`.

    Raises:
        ValueError: the name belongs to another codec.
    """

    def add(kind: Kind) -> Kind:
        if CODECS.setdefault(name, kind) is not kind:
            raise ValueError(f"a codec's name is used once; {name!r} is already {CODECS[name]!r}, choose another")
        return kind

    return add


def padded(rows: Sequence[Tensor]) -> Codes:
    """Ids of samples of different lengths, (L_i,) or (L_i, streams) each, as one tensor with zeros behind them."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    if not rows:
        return Codes(torch.zeros(0, 0, dtype=torch.long), lengths)
    return Codes(torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True), lengths)


class StoredCodec(ABC):
    """A codec of numbers: what it has learnt is tensors, and what it was told is plain values.

    A subclass gives `settings` (the arguments of its constructor), `tensors` and `restore`.
    """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, as JSON holds them."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was learnt; empty before `fit`."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave, and be frozen."""

    def save(self, folder: str | Path) -> None:
        """Write codec.json and codec.safetensors.

        Raises:
            UserError: nothing was fitted yet.
        """
        tensors = {name: x.contiguous() for name, x in self.tensors().items()}
        if not tensors:
            raise UserError(f"a codec is saved after fit; this {type(self).__name__} has learnt nothing yet")
        (name,) = [name for name, kind in CODECS.items() if kind is type(self)]
        said = {"format": FORMAT, "version": VERSION, "kind": name, "settings": self.settings()}
        write_atomically(Path(folder) / TENSORS, lambda file: file.write(to_bytes(tensors)))
        write_atomically(
            Path(folder) / DESCRIPTION, lambda file: file.write(json.dumps(said, indent=2).encode() + b"\n")
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The codec that `save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        try:
            said = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
            tensors = from_bytes((Path(folder) / TENSORS).read_bytes())
            codec = cls(**said["settings"])
            codec.restore(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{folder} holds no codec that can be read ({reason}); take another copy") from error
        return codec
