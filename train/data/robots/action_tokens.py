"""Chunks of actions as one row of targets each, and predicted rows as chunks again."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from zoo.codecs import Codec, Codes
from zoo.train.data.core.corpus import IGNORE

__all__ = ["ActionTokens", "Decoded"]


@runtime_checkable
class MayBeMalformed(Protocol):
    """A codec for which not every row of ids is a chunk."""

    def malformed(self, codes: Codes) -> Tensor:
        """Which rows are none, (B,) bool."""
        ...


class Decoded(NamedTuple):
    """actions: (B, T, D) float64, zeros where a row is malformed. malformed: (B,) bool."""

    actions: Tensor
    malformed: Tensor


class ActionTokens:
    """Rows of ids for a policy. Streams lie side by side in a row: all ids of the first step, then of the second.

    Where the chunks of a codec differ in length, one more id ends a row.

    Args:
        codec: fitted.
        samples: chunks (T, D) whose rows must have room.

    Attributes:
        n_slots: J, the ids of the longest row.
        vocab_size: different ids, the end included.
        ends: an id ends a row.
    """

    def __init__(self, codec: Codec, samples: Sequence[Tensor]):
        self.codec, self.shape = codec, tuple(samples[0].shape)
        lengths = codec.encode(samples).lengths
        self.ends = int(lengths.min()) < int(lengths.max()) or isinstance(codec, MayBeMalformed)
        self.n_slots = int(lengths.max()) * codec.streams + self.ends
        self.vocab_size = codec.vocab_size + self.ends

    def targets(self, samples: Sequence[Tensor]) -> Tensor:
        """Ids (B, J) int64 of chunks, -100 behind the end of a row; what is longer is cut off."""
        ids, lengths = self.codec.encode(samples)
        if not self.ends:
            return ids.flatten(1)
        at = torch.arange(self.n_slots)
        rows = torch.full((len(ids), self.n_slots), IGNORE)
        room = min(ids.shape[1], self.n_slots)
        rows[:, :room] = ids[:, :room]
        rows = torch.where(at < lengths[:, None], rows, IGNORE)
        return torch.where(at == lengths[:, None], self.vocab_size - 1, rows)

    def decode(self, ids: Tensor) -> Decoded:
        """Chunks of predicted rows (B, J)."""
        steps, width = self.shape
        if not self.ends:
            rows = ids.unflatten(1, (-1, self.codec.streams)) if self.codec.streams > 1 else ids
            codes = Codes(rows, torch.full((len(ids),), rows.shape[1]))
            actions = torch.stack(self.codec.decode(codes)).reshape(-1, steps, width)
            return Decoded(actions, torch.zeros(len(ids), dtype=torch.bool))
        ended = (ids == self.vocab_size - 1).long().cumsum(1) > 0
        codes = Codes(torch.where(ended, 0, ids), (~ended).sum(1))
        assert isinstance(self.codec, MayBeMalformed)
        malformed = self.codec.malformed(codes)
        actions = torch.zeros(len(ids), steps, width, dtype=torch.float64)
        whole = ~malformed
        if bool(whole.any()):
            actions[whole] = torch.stack(self.codec.decode(Codes(codes.ids[whole], codes.lengths[whole])))
        return Decoded(actions, malformed)
