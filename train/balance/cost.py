"""What a micro-step costs: a quadratic in the lengths, shared by the ranks of a group, and what its ranks exchange.

    time(s, d) = (a1 s^2 + a2 s) / d + communication(s, d)        one sequence of s tokens on d ranks
    step(d)    = b1 + communication.fixed(d)                      once per micro-step

All times are milliseconds. The fixed cost b1 decides how many micro-steps are best: measure it, never set it to zero.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np


class Communication(Protocol):
    """What the ranks of a group exchange, in milliseconds; both are 0 for a group of one."""

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """For sequences of `tokens` tokens on `degree` ranks; the arrays broadcast."""
        ...

    def fixed(self, degree: int) -> float:
        """Once per micro-step, whatever its tokens."""
        ...


@dataclass(frozen=True)
class RingTraffic:
    """RingTraffic attention: the keys and values of all other ranks pass by, s (d - 1) / d tokens on every rank.

    The transfer is added to the compute and not hidden behind it.
    """

    ms_per_token: float

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """ms_per_token s (d - 1) / d."""
        degree = np.asarray(degree)
        milliseconds: np.ndarray = self.ms_per_token * np.asarray(tokens) * (degree - 1) / degree
        return milliseconds

    def fixed(self, degree: int) -> float:
        """Seconds of a micro-step whatever its length: none."""
        return 0.0


@dataclass(frozen=True)
class StateHandOff:
    """Linear mixers: one state per layer crosses each cut, whatever the length."""

    ms: float = 0.0

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """Seconds for each sequence: none."""
        return np.zeros(np.broadcast_shapes(np.shape(tokens), np.shape(degree)))

    def fixed(self, degree: int) -> float:
        """Seconds of a micro-step whatever its length: one hand-off."""
        return self.ms if degree > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Times of micro-steps and the room on a rank.

    Args:
        a1, a2: ms per squared token and per token on one rank; a1 = 0 for a model without attention.
        b1: ms of a micro-step that do not depend on its tokens.
        capacity: tokens that fit on one rank.
        communication: what a group's ranks exchange.
    """

    a1: float
    a2: float
    b1: float
    capacity: int
    communication: Communication

    def __post_init__(self) -> None:
        if min(self.a1, self.a2, self.b1) < 0 or self.a2 == 0:
            raise ValueError(
                f"CostModel: a1 and b1 must be at least 0 and a2 above it; got {self.a1}, {self.b1}, {self.a2}"
            )
        if self.capacity < 1:
            raise ValueError(f"CostModel: a rank must have room for a token; got a capacity of {self.capacity} tokens")

    def time(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """Milliseconds of sequences of `tokens` tokens on `degree` ranks, without the step's fixed cost."""
        s, d = np.asarray(tokens, float), np.asarray(degree)
        milliseconds: np.ndarray = (self.a1 * s * s + self.a2 * s) / d + self.communication.per_sequence(s, d)
        return milliseconds

    def fixed(self, degree: int) -> float:
        """Milliseconds of a micro-step before its first token."""
        return self.b1 + self.communication.fixed(degree)

    def step(self, tokens: np.ndarray, degree: int) -> float:
        """Milliseconds of one micro-step of a group."""
        return self.fixed(degree) + float(self.time(tokens, np.asarray(degree)).sum())

    def in_chunks(self, chunk: int) -> "CostModel":
        """The same with room for whole chunks only, as a rank has whose range is cut at them.

        Raises:
            ValueError: there is no room for one.
        """
        if not 1 <= chunk <= self.capacity:
            raise ValueError(
                f"a rank must have room for one chunk of at least 1 token; got chunks of {chunk} and a capacity of "
                f"{self.capacity}, change the chunk"
            )
        return replace(self, capacity=self.capacity // chunk * chunk)

    def least_degree(self, tokens: np.ndarray) -> np.ndarray:
        """The fewest ranks that have room for each sequence."""
        return -(-np.asarray(tokens, np.int64) // self.capacity)


class MeasuredStep(NamedTuple):
    """A micro-step that was timed: its lengths, the ranks it ran on, and milliseconds."""

    lengths: tuple[int, ...]
    degree: int
    ms: float


def refit(cost: CostModel, measured: Iterable[MeasuredStep], forget: float = 1.0) -> CostModel:
    """Fit a1, a2 and b1 to measured steps by least squares, none below zero; communication stays as it is.

    Args:
        cost: the model before.
        measured: in order of time, the newest last.
        forget: weight of a step relative to the next newer one, in (0, 1].

    Raises:
        ValueError: the steps do not determine the coefficients.

    Cost: three columns, seven subsets of them.
    """
    steps = list(measured)
    rows = [[sum(s * s for s in m.lengths) / m.degree, sum(m.lengths) / m.degree, 1.0] for m in steps]
    spent = [
        m.ms - cost.communication.fixed(m.degree)
        - float(cost.communication.per_sequence(np.asarray(m.lengths, float), np.asarray(m.degree)).sum())
        for m in steps
    ]  # fmt: skip
    weights = np.sqrt(forget ** np.arange(len(steps))[::-1])
    features, target = np.asarray(rows).reshape(-1, 3) * weights[:, None], np.asarray(spent) * weights
    size = np.linalg.norm(features, axis=0)
    if len(steps) < 3 or not size.all() or np.linalg.matrix_rank(features / size) < 3:
        raise ValueError(
            f"refit: needs at least three micro-steps that differ in tokens and in squared lengths; got {len(steps)} "
            "that do not determine a1, a2 and b1, measure steps of other shapes"
        )
    best, least = np.zeros(3), np.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (3, 2, 1)):
        columns = list(kept)
        x = np.linalg.lstsq(features[:, columns] / size[columns], target, rcond=None)[0]
        left = float(np.square(features[:, columns] / size[columns] @ x - target).sum())
        if (x >= 0).all() and left < least:  # the best of the subsets that stay above zero is the constrained optimum
            best, least = np.zeros(3), left
            best[columns] = x / size[columns]
    return replace(cost, a1=float(best[0]), a2=float(best[1]), b1=float(best[2]))
