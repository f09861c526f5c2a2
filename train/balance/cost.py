"""What a micro-step costs: a quadratic in the lengths, shared by the ranks of a group, and what its ranks exchange.

    time(s, d) = (a1 s^2 + a2 s) / d + communication(s, d)        one sequence of s tokens on d ranks
    step(d)    = b1 + communication.fixed(d)                      once per micro-step

All times are milliseconds. The fixed cost b1 decides how many micro-steps are best: measure it, never set it to zero.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

MIB = 2.0**20


class Communication(Protocol):
    """What the ranks of a group exchange, in milliseconds; both are 0 for a group of one."""

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """For sequences of `tokens` tokens on `degree` ranks; the arrays broadcast."""
        ...

    def fixed(self, degree: int) -> float:
        """Once per micro-step, whatever its tokens."""
        ...


@dataclass(frozen=True)
class AllToAll:
    """Ulysses: every rank exchanges its share of the activations with the others.

    Args:
        mib_per_token: what one token adds to all exchanges of a step, forward and backward.
        bandwidth: (degree, GB/s) pairs, ascending; a degree between two of them runs at the larger one's speed.
    """

    mib_per_token: float
    bandwidth: tuple[tuple[int, float], ...]

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """mib_per_token s / (d v_d); GB/s are MB per ms."""
        degrees, speeds = (np.asarray(column, float) for column in zip(*self.bandwidth, strict=True))
        degree = np.asarray(degree)
        if degree.max(initial=1) > degrees[-1]:
            raise ValueError(
                f"AllToAll: the bandwidth is known up to degree {int(degrees[-1])}; got degree {int(degree.max())}, "
                "measure it and add it"
            )
        speed = speeds[np.searchsorted(degrees, degree)]
        return np.where(degree > 1, self.mib_per_token * np.asarray(tokens) / (degree * speed), 0.0)

    def fixed(self, degree: int) -> float:
        """Nothing."""
        return 0.0


@dataclass(frozen=True)
class Ring:
    """Ring attention: the keys and values of all other ranks pass by, s (d - 1) / d tokens on every rank.

    The transfer is added to the compute and not hidden behind it.
    """

    ms_per_token: float

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """ms_per_token s (d - 1) / d."""
        degree = np.asarray(degree)
        milliseconds: np.ndarray = self.ms_per_token * np.asarray(tokens) * (degree - 1) / degree
        return milliseconds

    def fixed(self, degree: int) -> float:
        """Nothing."""
        return 0.0


@dataclass(frozen=True)
class StateHandOff:
    """Linear mixers: one state per layer crosses each cut, whatever the length."""

    ms: float = 0.0

    def per_sequence(self, tokens: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """Nothing."""
        return np.zeros(np.broadcast_shapes(np.shape(tokens), np.shape(degree)))

    def fixed(self, degree: int) -> float:
        """One hand-off."""
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


def capacity(*, mib_per_token: float, parameters: float, ranks: int, mib: float, zero: int = 3) -> int:
    """Tokens that fit on a rank beside weights, gradients and Adam's states in mixed precision (16 bytes a parameter).

    Args:
        mib_per_token: activations of one token.
        parameters: of the model.
        ranks: among which ZeRO divides.
        mib: memory that may be used.
        zero: ZeRO's stage: 1 divides the optimiser's 12 bytes, 2 the gradients too, 3 everything.
    """
    shared = {0: 0 / 8, 1: 6 / 8, 2: 7 / 8, 3: 8 / 8}[zero]
    states = 16 * parameters / 1e9 * (shared / ranks + 1 - shared) * 1024  # FlexSP counts 10^9 bytes as 1024 MiB
    return int((mib - states) / mib_per_token)


class Published(NamedTuple):
    """Coefficients that FlexSP's authors profiled on 64 A100-40G in nodes of 8, 30 GB in use (its public code)."""

    a1: float
    a2: float
    b1: float
    mib_per_token: float
    width: int
    layers: int
    parameters: float

    def cost(self, ranks: int = 64, parameters: float | None = None) -> CostModel:
        """The cost model on `ranks` GPUs; `parameters` where the position table differs from that of 192K tokens."""
        room = capacity(
            mib_per_token=self.mib_per_token, parameters=parameters or self.parameters, ranks=ranks, mib=30 * 1024
        )
        # four all-to-alls, forward and backward, of bf16 activations in every layer
        exchange = AllToAll(4 * 2 * self.layers * self.width * 2 / MIB, A100_BANDWIDTH)
        return CostModel(a1=self.a1, a2=self.a2, b1=self.b1, capacity=room, communication=exchange)


A100_BANDWIDTH = ((1, 1.0), (2, 119.54), (4, 104.07), (8, 96.5), (16, 10.33), (32, 5.94), (64, 4.87))

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "7b": Published(5.128e-6, 0.1839576, 629.3563, 4.48, 4096, 32, 7.117e9),
        "13b": Published(9.2852e-6, 0.3060189, 1132.56, 4.22, 5120, 40, 13e9),
        "30b": Published(15.4262e-6, 0.8035742, 2789.36, 3.417, 6656, 60, 30e9),
    }
)
PARAMETERS_7B_384K = 7.850e9  # with the position table of 384K tokens


class Measured(NamedTuple):
    """A micro-step that was timed: its lengths, the ranks it ran on, and milliseconds."""

    lengths: tuple[int, ...]
    degree: int
    ms: float


def refit(cost: CostModel, measured: Iterable[Measured], forget: float = 1.0) -> CostModel:
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
