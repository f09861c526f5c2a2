"""One step: into which groups the ranks are divided, and which sequences each group gets.

The problem is FlexSP's (arXiv 2412.01523): groups have a power of two of ranks, and the slowest group should be as
fast as can be. Instead of an integer programme: all partitions of the ranks are priced at once, the groups of one size
taken for one fast machine; the best few are assigned in earnest, longest sequence first; the best of these are
improved by moving and swapping sequences.
"""

import functools
from typing import NamedTuple

import numpy as np

from zoo.train.balance.cost import CostModel

ENUMERATED = 64  # ranks up to which all partitions are priced, 1,828 of them; 128 ranks have 27,338
EARNEST = 64  # partitions that are assigned group by group
IMPROVED = 6  # of these, how many go through the local search
ROUNDS = 300  # changes of one local search at most


class Assignment(NamedTuple):
    """milliseconds: of the slowest group, without b1; infinite where the tokens do not fit.
    degrees, sequences: of every group, as sizes and as positions in the lengths that were given.
    """

    milliseconds: float
    degrees: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]


def powers_of_two(ranks: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the ranks."""
    return tuple(1 << i for i in range(ranks.bit_length()))


@functools.cache
def partitions(ranks: int) -> np.ndarray:
    """All ways to write `ranks` as a sum of powers of two: (ways, sizes), how many groups of each size."""
    sizes = powers_of_two(ranks)
    rows = np.zeros((1, len(sizes)), np.int64)
    left = np.array([ranks])
    for i in reversed(range(1, len(sizes))):
        most = left // sizes[i]
        rows = np.repeat(rows, most + 1, axis=0)
        used = np.concatenate([np.arange(m + 1) for m in most])
        rows[:, i] = used
        left = np.repeat(left, most + 1) - used * sizes[i]
    rows[:, 0] = left
    return rows


class AssignmentProblem:
    """A step's sequences, longest first, with their times on groups of every size.

    Args:
        tokens: (n,), descending.
        ranks: to be divided.
        cost: what micro-steps cost.
    """

    def __init__(self, tokens: np.ndarray, ranks: int, cost: CostModel):
        self.tokens, self.ranks = tokens, ranks
        self.sizes = np.array(powers_of_two(ranks))
        self.room = self.sizes * cost.capacity
        times = cost.time(tokens[:, None], self.sizes[None])
        self.times = np.where(tokens[:, None] <= self.room[None], times, np.inf)  # (n, sizes)
        self.start = np.array([cost.communication.fixed(int(d)) for d in self.sizes])

    def fluid(self, counts: np.ndarray) -> np.ndarray:
        """Estimated milliseconds of partitions (ways, sizes): the groups of one size work together on a sequence.

        Longest first, each to the size where it would be done first. Cost: n steps on (ways, sizes) arrays.
        """
        groups = np.where(counts > 0, counts, 1)
        load = np.where(counts > 0, self.start, np.inf)
        free = (counts * self.room).astype(float)
        rows, slowest = np.arange(len(counts)), np.zeros(len(counts))
        for s, t in zip(self.tokens.tolist(), self.times, strict=True):
            done = np.where(free >= s, np.maximum(load + t / groups, t), np.inf)
            best = done.argmin(axis=1)
            slowest = np.maximum(slowest, done[rows, best])
            load[rows, best] += t[best] / groups[rows, best]
            free[rows, best] -= s
        return slowest

    def assign(self, counts: np.ndarray, keep: int) -> list[Assignment]:
        """Longest sequence first, each to the group where it is done first: all partitions (ways, sizes) at once.

        Returns the `keep` fastest, in order.

        Cost: n steps on (ways, groups) arrays.
        """
        ways, most = len(counts), int(counts.sum(axis=1).max())
        size = np.full((ways, most), -1)  # which size each group has, largest first
        for i, row in enumerate(counts):
            each = np.repeat(np.arange(len(row))[::-1], row[::-1])
            size[i, : len(each)] = each
        free = np.where(size >= 0, self.room[size], -1)
        load = np.where(size >= 0, self.start[size], np.inf)
        rows, slowest = np.arange(ways), np.zeros(ways)
        chosen = np.empty((len(self.tokens), ways), np.int64)
        for k, (s, t) in enumerate(zip(self.tokens.tolist(), self.times, strict=True)):
            done = load + t[size]
            done[free < s] = np.inf
            best = done.argmin(axis=1)
            finish = done[rows, best]
            slowest = np.maximum(slowest, finish)
            load[rows, best] = finish
            free[rows, best] -= s
            chosen[k] = best
        assignments = []
        for i in np.argsort(slowest, kind="stable")[:keep]:
            degrees = tuple(int(d) for d in self.sizes[size[i][size[i] >= 0]])
            assignments.append(self._assignment(float(slowest[i]), degrees, chosen[:, i]))
        return assignments

    def improve(self, given: Assignment) -> Assignment:
        """Take sequences from the slowest group, or swap one with another group, while the slower of the two gains."""
        if not np.isfinite(given.milliseconds) or len(given.degrees) == 1:
            return given
        size = np.searchsorted(self.sizes, np.array(given.degrees))
        owner = np.empty(len(self.tokens), np.int64)
        for g, sequences in enumerate(given.sequences):
            owner[list(sequences)] = g
        t = self.times[:, size]  # (n, groups)
        own = t[np.arange(len(owner)), owner]
        load = np.bincount(owner, own, minlength=len(size)) + self.start[size]
        free = self.room[size] - np.bincount(owner, self.tokens, minlength=len(size)).astype(np.int64)
        for _ in range(ROUNDS):
            worst = int(load.argmax())
            inside, outside = np.flatnonzero(owner == worst), np.flatnonzero(owner != worst)
            if not len(inside):
                break
            # moves: (inside, groups)
            move = np.maximum(load[None] + t[inside], (load[worst] - own[inside])[:, None])
            move[:, worst] = np.inf
            move[self.tokens[inside][:, None] > free[None]] = np.inf
            best, change = move.min(initial=np.inf), ("move", move)
            if len(outside):
                # swaps: (inside, outside)
                where, delta = owner[outside], self.tokens[inside][:, None] - self.tokens[outside][None]
                there = load[where][None] - own[outside][None] + t[inside][:, where]
                here = load[worst] - own[inside][:, None] + t[outside, worst][None]
                swap = np.maximum(there, here)
                swap[(delta > free[where][None]) | (-delta > free[worst])] = np.inf
                if swap.min() < best:
                    best, change = swap.min(), ("swap", swap)
            if not best < load[worst] * (1 - 1e-9):
                break
            i, j = np.unravel_index(int(change[1].argmin()), change[1].shape)
            k = int(inside[i])
            changes = [(k, int(j))] if change[0] == "move" else [(k, int(where[j])), (int(outside[j]), worst)]
            for k, g in changes:
                free[owner[k]] += self.tokens[k]
                load[owner[k]] -= own[k]
                owner[k], own[k] = g, t[k, g]
                free[g] -= self.tokens[k]
                load[g] += own[k]
        used = np.bincount(owner, minlength=len(size)) > 0
        return self._assignment(float(load[used].max()), given.degrees, owner)

    def candidates(self) -> np.ndarray:
        """The partitions that the fluid estimate likes best, (ways, sizes)."""
        if self.ranks <= ENUMERATED:
            ways = partitions(self.ranks)
            price = self.fluid(ways)
        else:
            ways, price = self._climb()
        return ways[np.argsort(price, kind="stable")[:EARNEST]]

    def _climb(self) -> tuple[np.ndarray, np.ndarray]:
        """Partitions near the best one, where there are too many to price all: split or merge 1, 2, 4, ... groups."""
        last = len(self.sizes) - 1
        rows = [[self.ranks // d if i == j else 0 for j in range(last + 1)] for i, d in enumerate(self.sizes)]
        for row, d in zip(rows, self.sizes, strict=True):  # what a size leaves over
            for j in range(last + 1):
                row[j] += int(self.ranks % d) >> j & 1
        ways = np.unique(np.array(rows), axis=0)
        price = self.fluid(ways)
        while True:
            near = {tuple(row) for row in ways.tolist()}
            for row in ways[np.argsort(price, kind="stable")[:8]]:
                for i in range(last):
                    for n in powers_of_two(self.ranks):
                        for sign in (n, -n):  # n groups of size i + 1 become 2 n of size i, or the other way
                            other = row.copy()
                            other[i] += 2 * sign
                            other[i + 1] -= sign
                            if other.min() >= 0:
                                near.add(tuple(other.tolist()))
            known = {tuple(row) for row in ways.tolist()}
            fresh = np.array(sorted(near - known)).reshape(-1, last + 1)
            before = price.min()
            ways, price = np.concatenate([ways, fresh]), np.concatenate([price, self.fluid(fresh)])
            if not price.min() < before:
                return ways, price

    def _assignment(self, milliseconds: float, degrees: tuple[int, ...], owner: np.ndarray) -> Assignment:
        order = np.argsort(owner, kind="stable")
        parts = np.split(order, np.searchsorted(owner[order], np.arange(1, len(degrees))))
        return Assignment(milliseconds, degrees, tuple(tuple(part.tolist()) for part in parts))


def best_assignment(tokens: np.ndarray, ranks: int, cost: CostModel) -> Assignment:
    """A good way to run sequences (descending lengths) in one step; its milliseconds are infinite where none fits."""
    problem = AssignmentProblem(tokens, ranks, cost)
    earnest = problem.assign(problem.candidates(), keep=IMPROVED)
    return min((problem.improve(a) for a in earnest), key=lambda a: a.milliseconds)


def uniform_assignment(tokens: np.ndarray, ranks: int, degree: int, cost: CostModel) -> Assignment:
    """Groups of one size only."""
    problem = AssignmentProblem(tokens, ranks, cost)
    counts = np.where(problem.sizes == degree, ranks // degree, 0)
    return problem.improve(problem.assign(counts[None], keep=1)[0])
