"""What a plan is: which ranks run which documents in which micro-step, and what one rank sees of it.

A step is a set of groups of ranks that do not overlap. A group's documents are laid one after the other and the stream
is cut into as many ranges as the group has ranks, as even as whole chunks allow; the i-th rank of the group holds the
i-th range. Everything follows from these few numbers, so that ranks that know the same plan need not talk about it.
"""

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


class Group(NamedTuple):
    """Ranks, in the order of time, and the sequences that they share, as positions in the plan's lengths."""

    ranks: tuple[int, ...]
    sequences: tuple[int, ...]


class RankStep(NamedTuple):
    """One micro-step as one rank runs it.

    step: position in the order that all ranks keep: a rank waits for peers of the same step only.
    ring: the group's global ranks in the order of time; the previous one holds the past.
    place: this rank's position in the ring.
    pieces: what it holds; their tokens side by side are its part of the stream.
    cu_seqlens: the boundaries of its documents as zoo.ops.shard wants them: where a document begins at the left edge
        of a later rank an empty one comes first.
    valid_tokens: tokens with a successor in their document, here or on the next rank: what a shifted target can score.
    stream: the boundaries of all documents in the ring's whole stream.
    """

    step: int
    ring: tuple[int, ...]
    place: int
    pieces: tuple[Piece, ...]
    cu_seqlens: tuple[int, ...]
    valid_tokens: int
    stream: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens on this rank."""
        return self.cu_seqlens[-1]


@dataclass(frozen=True)
class Plan:
    """Micro-steps of one update.

    Args:
        lengths: tokens of each sequence.
        ranks: how many there are.
        steps: of groups of disjoint ranks.
        chunk: cuts inside a group are multiples of it.
        lockstep: a step begins when the one before is over on all ranks, as when weights are gathered in every step.
        documents: what the sequences are called outside; their positions when omitted.
    """

    lengths: tuple[int, ...]
    ranks: int
    steps: tuple[tuple[Group, ...], ...]
    chunk: int = 1
    lockstep: bool = False
    documents: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.documents:
            object.__setattr__(self, "documents", tuple(range(len(self.lengths))))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences of the plan."""
        return sum(self.lengths)

    @property
    def valid_tokens(self) -> int:
        """Of all ranks and steps: the divisor of a mean loss over shifted targets."""
        return self.tokens - len(self.lengths)

    def digest(self) -> str:
        """A hash of everything that ranks must agree on."""
        said = (self.lengths, self.ranks, self.steps, self.chunk, self.lockstep, self.documents)
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def named(self, documents: Sequence[int]) -> "Plan":
        """The same plan; sequence i is called documents[i]."""
        return replace(self, documents=tuple(int(d) for d in documents))

    def reordered(self, order: Sequence[int]) -> "Plan":
        """The same steps in another order. (Steps sorted by length would tie what is learnt last to length.)"""
        return replace(self, steps=tuple(self.steps[i] for i in order))

    def check(self, capacity: int | None = None) -> None:
        """Raise AssertionError unless every sequence is run once, groups are disjoint and all fit: for tests."""
        seen = sorted(k for step in self.steps for group in step for k in group.sequences)
        assert seen == list(range(len(self.lengths))), "every sequence exactly once"
        for step in self.steps:
            used = [rank for group in step for rank in group.ranks]
            assert len(used) == len(set(used)), "groups of a step are disjoint"
            assert all(0 <= rank < self.ranks for rank in used), "ranks exist"
            for group in step:
                size, stream = len(group.ranks), self.stream(group)
                edges = [edge(stream, i, size, self.chunk) for i in range(size + 1)]
                assert edges[0] == 0, "nothing lies before the first range"
                assert edges[-1] == stream, "nothing lies after the last one"
                if capacity is not None:
                    assert max(j - i for i, j in itertools.pairwise(edges)) <= capacity, "every rank has room"

    def stream(self, group: Group) -> int:
        """Tokens of a group."""
        return sum(self.lengths[k] for k in group.sequences)

    def for_rank(self, rank: int, *, idle: bool = False) -> list[RankStep]:
        """The micro-steps of a rank, in the order in which it must run them.

        Args:
            rank: which.
            idle: with an empty one of its own where a step has no work for the rank: as many on every rank, as cut
                weights want it.
        """
        steps = []
        for position, step in enumerate(self.steps):
            group = next((group for group in step if rank in group.ranks), None)
            if group is not None:
                steps.append(self._rank_step(position, group, group.ranks.index(rank)))
            elif idle:
                steps.append(RankStep(position, (rank,), 0, (), (0, 0), 0, (0,)))
        return steps

    @property
    def most(self) -> int:
        """Tokens of the largest stretch that any rank runs at once."""
        streams = ((self.stream(group), len(group.ranks)) for step in self.steps for group in step)
        return max(
            edge(stream, i + 1, size, self.chunk) - edge(stream, i, size, self.chunk)
            for stream, size in streams
            for i in range(size)
        )

    def _rank_step(self, position: int, group: Group, index: int) -> RankStep:
        cuts = [0, *itertools.accumulate(self.lengths[k] for k in group.sequences)]
        size = len(group.ranks)
        left, right = edge(cuts[-1], index, size, self.chunk), edge(cuts[-1], index + 1, size, self.chunk)
        pieces, ended = [], 0
        for i in range(bisect.bisect_right(cuts, left) - 1, len(group.sequences)):
            start, end = max(left, cuts[i]), min(right, cuts[i + 1])
            if start >= end:
                break
            pieces.append(Piece(self.documents[group.sequences[i]], start - cuts[i], end - cuts[i]))
            ended += end == cuts[i + 1]
        fresh = 0 < left < cuts[-1] and left in cuts
        lengths = [p.end - p.start for p in pieces] or [0]
        bounds = (*([0] if fresh else []), 0, *itertools.accumulate(lengths))
        return RankStep(position, group.ranks, index, tuple(pieces), bounds, right - left - ended, tuple(cuts))


def edge(length: int, index: int, size: int, chunk: int = 1) -> int:
    """Where the range of the index-th of `size` ranks begins: whole chunks, as even as can be."""
    chunks = -(-length // chunk)
    return min(length, chunk * (chunks * index // size))


def as_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Lengths as int64; at least one sequence, none empty.

    Raises:
        ValueError: otherwise.
    """
    checked = np.asarray(lengths)
    if checked.ndim != 1 or checked.size == 0 or not np.issubdtype(checked.dtype, np.integer) or checked.min() < 1:
        raise ValueError(
            f"a plan needs whole lengths of at least one token, one a sequence; got {lengths!r:.80}, drop empty ones"
        )
    return checked.astype(np.int64)


def refuse_too_long(lengths: np.ndarray, capacity: int, ranks: int) -> None:
    """Raise ValueError where one sequence does not fit on all ranks together."""
    longest = int(lengths.max())
    if longest > capacity * ranks:
        raise ValueError(
            f"a sequence may have at most {ranks} ranks x {capacity} tokens = {ranks * capacity}; one of {longest} "
            "came: cut or drop it, or use more ranks"
        )
