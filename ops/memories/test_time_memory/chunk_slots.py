"""Time laid out as whole chunks of every row or document, behind chunks that an earlier call began.

    tokens   a0 a1 a2 a3 a4 b0 b1           chunks of 4; document b goes on behind one token of an earlier call, B
    chunks   [a0 a1 a2 a3] [B  b0 b1 . ] [a4 .  .  . ]

A token's slot is its position in the document, modulo the chunk. How many slots an earlier call filled is a tensor, and
nothing here reads it: a document gets room for one chunk more. Chunks stand in the order in which a scan visits them:
all first chunks, then all second ones. Documents are in the order of falling numbers of chunks, so that those which
still run are a prefix.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors


class _Tables(NamedTuple):
    """What lengths alone say, int64. G chunks, n documents, T tokens.

    order, rank: (n,) documents in the order of the scan, and each one's place in it; document, first: (G,) whose chunk
    it is, and its first slot; start, length: (n,) of each document's tokens; base: (J,) where the chunks of a position
    begin; of_token, step: (T,) a token's document, and its number there.
    """

    order: Tensor
    rank: Tensor
    document: Tensor
    first: Tensor
    start: Tensor
    length: Tensor
    base: Tensor
    of_token: Tensor
    step: Tensor


_Steps = tuple[tuple[int, int], ...]
_Full = tuple[bool | None, ...]


@cached_tensors()
def _of_documents(
    lengths: tuple[int, ...], size: int, begun: bool, device: torch.device
) -> tuple[_Tables, _Steps, _Full]:
    """The tables; at each position, which chunks run, (start, stop), and whether all are full, or None."""
    counts = [_count(n, size, begun) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: -counts[i])
    steps, document, first = [], list[int](), list[int]()
    for j in range(max(counts, default=0)):
        running = [i for i in order if counts[i] > j]
        steps.append((len(document), len(document) + len(running)))
        document += running
        first += [j * size] * len(running)
    length = torch.tensor(lengths, dtype=torch.int64)
    starts = length.cumsum(0) - length
    of_token = torch.arange(len(lengths)).repeat_interleave(length)
    step = torch.arange(len(of_token)) - starts[of_token]
    rank = sorted(range(len(order)), key=order.__getitem__)
    base = [start for start, _ in steps]
    lists = (torch.tensor(x, dtype=torch.int64) for x in (order, rank, document, first))
    made = (*lists, starts, length, torch.tensor(base, dtype=torch.int64), of_token, step)
    whole = [[lengths[i] >= (j + 1) * size for i in order[: stop - start]] for j, (start, stop) in enumerate(steps)]
    full = [None if begun or len({*each}) > 1 else each[0] for each in whole]
    return _Tables(*(x.to(device) for x in made)), tuple(steps), tuple(full)


def _of_batch(
    batch: int, length: int, size: int, begun: bool, device: torch.device
) -> tuple[_Tables, _Steps, _Full]:  # fmt: skip
    """The same of rows of one length; on the device alone, for compilers follow no cache."""
    count = _count(length, size, begun)
    rows, chunks = torch.arange(batch, device=device), torch.arange(count, device=device)
    made = _Tables(
        rows, rows, rows.repeat(count), (chunks * size).repeat_interleave(batch), rows * length,
        torch.full_like(rows, length), chunks * batch, rows.repeat_interleave(length),
        torch.arange(length, device=device).repeat(batch),
    )  # fmt: skip
    steps = tuple((j * batch, (j + 1) * batch) for j in range(count))
    return made, steps, tuple(None if begun else (j + 1) * size <= length for j in range(count))


def _count(length: int, size: int, begun: bool) -> int:
    """Chunks that so many tokens may need, wherever the first one stands in its chunk."""
    return -(-(length + (size - 1 if begun else 0)) // size) if length else 0


class ChunkSlots:
    """The chunks of one call.

    Args:
        batch, length: B and T, at least 1.
        size: C, slots of a chunk.
        cuts: boundaries of packed documents (B = 1), or None.
        filled: (n,) int64, slots that an earlier call filled in each document's first chunk, below C; None for none.
        device: where the tokens are.

    steps: at each position, which of the G chunks run there, (start, stop).
    full: at each position, whether the chunks end there: True, False, or a mask (stop - start,).
    """

    def __init__(
        self, batch: int, length: int, size: int, cuts: tuple[int, ...] | None, filled: Tensor | None,
        device: torch.device,
    ):  # fmt: skip
        self.batch, self.length, self.size = batch, length, size
        self.documents = batch if cuts is None else len(cuts) - 1
        if cuts is None:
            self.tables, self.steps, whole = _of_batch(batch, length, size, filled is not None, device)
        else:
            lengths = tuple(b - a for a, b in itertools.pairwise(cuts))
            self.tables, self.steps, whole = _of_documents(lengths, size, filled is not None, device)
        begun = torch.zeros_like(self.tables.start) if filled is None else filled
        after = begun + self.tables.length
        self.filled = after % size  # (n,) of the chunk that is open behind this call
        self.full: list[bool | Tensor] = [
            after[self.tables.order[: stop - start]] >= (j + 1) * size if known is None else known
            for j, ((start, stop), known) in enumerate(zip(self.steps, whole, strict=True))
        ]
        slot = self.tables.first[:, None] + torch.arange(size, device=device)
        self._where = self._stream(slot, self.tables.document[:, None], begun)
        everyone = torch.arange(self.documents, device=device)[:, None]
        slot = (after // size * size)[:, None] + torch.arange(size, device=device)
        self._open = self._stream(slot, everyone, begun)
        place = begun[self.tables.of_token] + self.tables.step
        if self.steps:
            chunk = self.tables.base[place // size] + self.tables.rank[self.tables.of_token]
            self._back = chunk * size + place % size

    def _stream(self, slot: Tensor, document: Tensor, begun: Tensor) -> Tensor:
        """Where a slot of a document lies in: all tokens, the slots of open chunks, one row of zeros."""
        tokens = self.batch * self.length
        token = slot - begun[document]
        there = (token >= 0) & (token < self.tables.length[document])
        nothing = tokens + self.documents * self.size
        before = torch.where(token < 0, tokens + document * self.size + slot.clamp_max(self.size - 1), nothing)
        return torch.where(there, self.tables.start[document] + token, before)

    def lay(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, H, F) and open chunks (n, H, C, F) -> all chunks (G, H, C, F), and those that are open then."""
        stream = torch.cat([x.flatten(0, 1), before.transpose(1, 2).flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        return stream[self._where].transpose(1, 2), stream[self._open].transpose(1, 2)

    def back(self, y: Tensor) -> Tensor:
        """(G, H, C, F) -> (B, T, H, F), the slots of this call's tokens."""
        made: Tensor = y.transpose(1, 2).flatten(0, 1)[self._back].unflatten(0, (self.batch, self.length))
        return made
