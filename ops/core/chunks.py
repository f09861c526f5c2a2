"""Time cut into chunks, for batches and for packed documents alike.

Two views of the same cut. `ChunkedTime` is for the torch forms: it lays the chunks of all documents out as one axis, in
the order in which a scan over chunks visits them, padded with zeros to full chunks. `chunk_table` is for kernels: token
ranges in the flattened (B * T) stream, nothing is moved. A batch is simply B documents of equal length.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors


class ChunkedTime:
    """A cut of time into chunks of C tokens, position-major: all first chunks, then all second chunks, and so on.

    Documents are ordered by falling length, so that the documents which still run at chunk position j are a prefix of
    the documents and their chunks are one slice of the chunk axis: `steps[j] = (start, stop)`.

    Args:
        batch, length: the shape (B, T) of the token stream.
        size: C, tokens per chunk.
        cuts: document boundaries (B = 1), or None for B documents of T tokens.
        device: where the index lives.
    """

    def __init__(self, batch: int, length: int, size: int, cuts: tuple[int, ...] | None, device: torch.device):
        self.batch, self.length, self.size = batch, length, size
        self.steps: list[tuple[int, int]] = []
        self._index: Tensor | None = None
        self._order: Tensor | None = None
        self._places = list(range(batch))  # of each document in the order of the scan
        if cuts is None:
            self.n_documents = batch
            n = -(-length // size)
            self.steps = [(j * batch, (j + 1) * batch) for j in range(n)]
        else:
            self.n_documents = len(cuts) - 1
            lengths = [right - left for left, right in itertools.pairwise(cuts)]
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            self._places = sorted(range(len(lengths)), key=order.__getitem__)
            n = -(-max(lengths) // size)
            begins: list[int] = []
            ends: list[int] = []
            for j in range(n):
                running = [i for i in order if lengths[i] > j * size]
                self.steps.append((len(begins), len(begins) + len(running)))
                begins += [cuts[i] + j * size for i in running]
                ends += [cuts[i + 1] for i in running]
            begin, end = (torch.tensor(x, dtype=torch.int64, device=device) for x in (begins, ends))
            index = begin[:, None] + torch.arange(size, device=device)
            self._index = torch.where(index < end[:, None], index, length)  # (G, C); `length`: missing
            self._order = torch.tensor(order, device=device)
        self.n_chunks = self.steps[-1][1] if self.steps else 0

    def split(self, x: Tensor, positions: tuple[int, int] | None = None) -> Tensor:
        """(B, T, H, ...) -> (G, H, C, ...): G chunks of all documents, missing tokens are zeros.

        `positions` (first, last + 1) restricts the result to chunks steps[first][0] ... steps[last][1] - 1.
        """
        if self._index is None:
            first, stop = positions or (0, len(self.steps))
            x = x[:, first * self.size : stop * self.size]
            pad = (stop - first) * self.size - x.shape[1]
            if pad:
                x = torch.cat([x, x.new_zeros(self.batch, pad, *x.shape[2:])], dim=1)
            x = x.unflatten(1, (stop - first, self.size)).movedim(3, 2).transpose(0, 1)  # (n, B, H, C, ...)
            return x.contiguous().flatten(0, 1)
        index = self._index if positions is None else self._index[self._chunks(positions)]  # (G, C)
        missing = (index == self.length).view(*index.shape, *(1 for _ in x.shape[2:]))
        x = x[0][index.clamp_max(self.length - 1)].masked_fill(missing, 0)
        return x.transpose(1, 2).contiguous()

    def _chunks(self, positions: tuple[int, int]) -> slice:
        """The slice of the chunk axis that a range of positions is."""
        first, stop = positions
        return slice(self.steps[first][0], self.steps[stop - 1][1])

    def merge(self, y: Tensor) -> Tensor:
        """(G, H, C, ...) -> (B, T, H, ...), the inverse of `split`."""
        y = y.transpose(1, 2)  # (G, C, H, ...)
        if self._index is None:
            n = -(-self.length // self.size)
            y = y.unflatten(0, (n, self.batch)).transpose(0, 1).flatten(1, 2)  # (B, n * C, H, ...)
            return y[:, : self.length]
        where = self._index.new_empty(self.length + 1)
        where[self._index.flatten()] = torch.arange(self._index.numel(), device=y.device)
        return y.flatten(0, 1)[where[: self.length]].unsqueeze(0)

    def put(self, out: Tensor, y: Tensor, positions: tuple[int, int]) -> None:
        """Write the chunks y (G', H, C, ...) of a range of positions to their places in out (B, T, H, ...)."""
        y = y.transpose(1, 2)  # (G', C, H, ...)
        if self._index is None:
            place = out[:, positions[0] * self.size : positions[1] * self.size]
            y = y.unflatten(0, (-1, self.batch))  # (n', B, C, H, ...)
            whole = place.shape[1] // self.size
            place[:, : whole * self.size].unflatten(1, (whole, self.size)).copy_(y[:whole].transpose(0, 1))
            if whole < len(y):
                rest = place[:, whole * self.size :]
                rest.copy_(y[whole, :, : rest.shape[1]])
        else:
            index = self._index[self._chunks(positions)].flatten()
            there = index < self.length
            out[0, index[there]] = y.flatten(0, 1)[there].to(out.dtype)

    def segments(self, numbers: int, width: int) -> list[tuple[int, int]]:
        """Cut the chunk positions into ranges that hold about `numbers` elements at `width` elements per token."""
        ranges: list[tuple[int, int]] = []
        first, held = 0, 0
        for position, (start, stop) in enumerate(self.steps):
            size = (stop - start) * self.size * width
            if held and held + size > numbers:
                ranges.append((first, position))
                first, held = position, 0
            held += size
        return [*ranges, (first, len(self.steps))] if self.steps else []

    def part(self, x: Tensor, positions: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(B, T, H, ...) -> the chunks of a range of positions, (N, C, ...) with N = chunks * heads."""
        return self.split(x, positions).flatten(0, 1).to(dtype)

    def rows(self, positions: tuple[int, int], heads: int) -> list[slice]:
        """At each position of a range, which of the N = chunks * heads rows of the range run there."""
        steps = self.steps[slice(*positions)]
        return [slice((start - steps[0][0]) * heads, (stop - steps[0][0]) * heads) for start, stop in steps]

    def rows_of(self, document: int, positions: tuple[int, int], heads: int) -> list[slice]:
        """The same for one document alone, at the positions of the range where it runs."""
        first = self._places[document] * heads
        rows = self.rows(positions, heads)
        return [slice(x.start + first, x.start + first + heads) for x in rows if x.stop - x.start > first]

    def order(self, state: Tensor) -> Tensor:
        """States by document -> states in the order of the scan."""
        return state if self._order is None else state[self._order]

    def unorder(self, state: Tensor) -> Tensor:
        """The inverse of `order`."""
        return state if self._order is None else state[self._order.argsort()]


class ChunkTable(NamedTuple):
    """The cut of time for kernels; tokens are rows of the flattened (B * T) stream. All int64.

    begin, end: (G,) token range of each chunk, document by document; document: (G,) whose chunk it is;
    offsets: (n_documents + 1,) where each document's chunks start on the chunk axis.
    """

    begin: Tensor
    end: Tensor
    document: Tensor
    offsets: Tensor

    @property
    def n_chunks(self) -> int:
        """The number of chunks of all documents, G."""
        return self.begin.shape[0]

    @property
    def n_documents(self) -> int:
        """The number of documents; of a batch, B."""
        return self.offsets.shape[0] - 1


@cached_tensors()
def chunk_table(batch: int, length: int, size: int, cuts: tuple[int, ...] | None, device: torch.device) -> ChunkTable:
    """Cut B documents of T tokens, or the documents between `cuts`, into chunks of at most `size` tokens."""
    bounds = range(0, (batch + 1) * length, length) if cuts is None and length else cuts or (0,) * (batch + 1)
    begin: list[int] = []
    end: list[int] = []
    document: list[int] = []
    offsets = [0]
    for i, (left, right) in enumerate(itertools.pairwise(bounds)):
        starts = range(left, right, size)
        begin += starts
        end += [min(s + size, right) for s in starts]
        document += [i] * len(starts)
        offsets.append(len(begin))
    return ChunkTable(*(torch.tensor(x, dtype=torch.int64, device=device) for x in (begin, end, document, offsets)))
