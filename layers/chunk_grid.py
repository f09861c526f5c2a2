"""Time laid out as whole chunks of each row or document, so that what looks inside a chunk sees nothing else.

    tokens    a0 a1 a2 a3 a4 b0 b1          chunks of 4; document b goes on behind one token of an earlier call, B
    grid      [a0 a1 a2 a3] [a4 .  .  . ] [B  b0 b1 . ]

A token's slot in its chunk is its position in the document, modulo the chunk. So a chunk that an earlier call began is
finished by the next one, wherever time was cut.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.cached import cached_tensors

__all__ = ["ChunkGrid"]


class _Tables(NamedTuple):
    """What lengths alone say, int64. S slots, n documents, T tokens.

    document, slot: (S,) whose slot it is, and its number in the document's chunks; of_token, step: (T,) the same of
    tokens; start: (n,) first token; length: (n,) tokens; first: (n,) first slot; chunks: (n,) how many.
    """

    document: Tensor
    slot: Tensor
    of_token: Tensor
    step: Tensor
    start: Tensor
    length: Tensor
    first: Tensor
    chunks: Tensor


@cached_tensors()
def _tables(lengths: tuple[int, ...], size: int, begun: bool, device: torch.device) -> _Tables:
    """A document takes the chunks that it needs, with room for one that was begun; one at least."""
    chunks = [max(1, -(-(n + (size - 1 if begun else 0)) // size)) for n in lengths]
    rows = torch.arange(len(lengths))
    counts, tokens = torch.tensor(chunks), torch.tensor(lengths)
    start, first = tokens.cumsum(0) - tokens, (counts.cumsum(0) - counts) * size
    document, of_token = rows.repeat_interleave(counts * size), rows.repeat_interleave(tokens)
    slot = torch.arange(len(document)) - first[document]
    step = torch.arange(len(of_token)) - start[of_token]
    made = (document, slot, of_token, step, start, tokens, first, counts)
    return _Tables(*(x.to(device=device, dtype=torch.int64) for x in made))


class ChunkGrid:
    """The chunks of B rows of T tokens, or of packed documents.

    Args:
        batch, length: B and T.
        size: C, slots of a chunk.
        cuts: boundaries of packed documents (B = 1), or None.
        filled: (n,) int64, slots that an earlier call filled in each document's first chunk, below C; None for none.
        device: where the tokens are.
    """

    def __init__(
        self, batch: int, length: int, size: int, cuts: tuple[int, ...] | None, filled: Tensor | None,
        device: torch.device,
    ):  # fmt: skip
        self.batch, self.length, self.size, self.filled = batch, length, size, filled
        self.plain = cuts is None and filled is None  # nothing to look up: rows of equal length from the beginning
        self.documents = batch if cuts is None else len(cuts) - 1
        lengths = (length,) * batch if cuts is None else tuple(b - a for a, b in itertools.pairwise(cuts))
        if self.plain:
            self.size = min(size, max(length, 1))
            return
        self.tables = _tables(lengths, size, filled is not None, device)
        begun = torch.zeros_like(self.tables.start) if filled is None else filled
        self._begun = begun
        token = self.tables.slot - begun[self.tables.document]  # of the document
        self._has_token = (token >= 0) & (token < self.tables.length[self.tables.document])
        self._was_there = token < 0
        self._token = self.tables.start[self.tables.document] + token
        self._place = self.tables.first[self.tables.of_token] + begun[self.tables.of_token] + self.tables.step

    def lay(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (G, C, D), zeros in slots that have no token.

        Args:
            x: (B, T, D).
            before: (n, C, D), the slots of the chunks that were begun.
        """
        if self.plain:
            missing = -self.length % self.size
            padded = F.pad(x, (0, 0, 0, missing)) if missing else x
            return padded.reshape(-1, self.size, x.shape[2])
        parts, end = [x.flatten(0, 1)], self.batch * self.length
        where = torch.where(self._has_token, self._token, end)
        if before is not None:
            parts.append(before.flatten(0, 1))
            there = end + self.tables.document * self.size + self.tables.slot
            end += len(before) * self.size
            where = torch.where(self._was_there, there, torch.where(self._has_token, self._token, end))
        stream = torch.cat([*parts, x.new_zeros(1, x.shape[2])])
        return stream[where].view(-1, self.size, x.shape[2])

    def back(self, y: Tensor) -> Tensor:
        """(G, C, D) -> (B, T, D), the slots of this call's tokens."""
        if self.plain:
            return y.reshape(self.batch, -1, y.shape[2])[:, : self.length]
        rows: Tensor = y.flatten(0, 1)[self._place].unflatten(0, (self.batch, self.length))
        return rows

    def last(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The chunk that each document's next token goes to: its slots (n, size, D), zeros where free, and how many are
        filled (n,). `size` is the C of the layer."""
        if self.plain:
            kept = self.length % size
            rows = x.reshape(self.batch, -1, x.shape[2])[:, self.length - kept : self.length]
            return F.pad(rows, (0, 0, 0, size - kept)), torch.full((self.batch,), kept, device=x.device)
        after = self._begun + self.tables.length
        filled = after % size
        chunk = self.tables.first // size + torch.minimum(after // size, self.tables.chunks - 1)
        free = torch.arange(size, device=x.device) >= filled[:, None]
        return x[chunk].masked_fill(free.unsqueeze(-1), 0), filled
