"""Retention gates: what a memory keeps, and how its weights W follow from the accumulator A that the updates change.

Every rule is a_t A_{t-1} plus an update. What differs is a map A -> W, read where gradients are taken, and what the end
of a chunk makes of A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-6  # of a norm that divides: an accumulator that decayed to nothing must not make weights infinite


class Retention:
    """W = A, as weight decay has it; a subclass says what differs.

    linear: inside a chunk weights are a frozen factor times A, so that a token can be read behind its own update by
        products of rank one.
    """

    linear: bool = True

    def factor(self, A: Tensor) -> Tensor | None:
        """Of a linear gate: W = factor * A, (..., 1, 1); None for 1."""
        return None

    def weights(self, A: Tensor) -> Tensor:
        """W of an accumulator (..., out, in)."""
        factor = self.factor(A)
        return A if factor is None else factor * A

    def start(self, W: Tensor) -> Tensor:
        """An accumulator whose weights are W."""
        return W

    def border(self, before: Tensor, after: Tensor) -> Tensor:
        """The accumulator behind a chunk, from those at its beginning and at its end."""
        return after


@dataclass(frozen=True)
class WeightDecay(Retention):
    """W_t = a_t W_{t-1} + update: the l2 gate, or none where a is 1."""


@dataclass(frozen=True)
class LqRetention(Retention):
    """W = A / ||A||_q^(q-2), the norm over a whole matrix of one head. Inside a chunk the norm is that at its start.

    The map is of degree 3 - q: at q = 4 it is the inversion in the unit ball of the 4-norm, so that a smaller A means
    larger weights.

    Args:
        q: above 1; at 3 the size of A has no effect.

    Raises:
        ValueError: q <= 1.
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        if self.q <= 1:
            raise ValueError(f"LqRetention: q must be above 1; got {self.q}")

    def factor(self, A: Tensor) -> Tensor | None:
        """||A||_q^(2-q), one number a matrix."""
        return None if self.q == 2 else _norm(A, self.q).pow(2 - self.q)

    def start(self, W: Tensor) -> Tensor:
        """W / ||W||_4^2 at q = 4; at q = 3, where the size means nothing, W itself."""
        return W if self.q in (2, 3) else W * _norm(W, self.q).pow((self.q - 2) / (3 - self.q))


@dataclass(frozen=True)
class MirrorRetention(Retention):
    """The mirror map of ||W||_q^2 / 2: W = sign(A) |A|^(s-1) / ||A||_s^(s-2) with 1/q + 1/s = 1; W = A at q = 2.

    Args:
        q: above 1.
        eps: |A| is sqrt(A^2 + eps), so that the power has a slope at 0.

    Raises:
        ValueError: q <= 1 or eps <= 0.
    """

    q: float = 4.0
    eps: float = 1e-6
    linear = False

    def __post_init__(self) -> None:
        if self.q <= 1 or self.eps <= 0:
            raise ValueError(f"MirrorRetention: q must be above 1 and eps above 0; got q = {self.q}, eps = {self.eps}")

    def weights(self, A: Tensor) -> Tensor:
        """The map, with the dual exponent s."""
        return self._map(A, self.q / (self.q - 1))

    def start(self, W: Tensor) -> Tensor:
        """The inverse map, which has the exponent q."""
        return self._map(W, self.q)

    def _map(self, x: Tensor, s: float) -> Tensor:
        return x * (x.square() + self.eps).pow(s / 2 - 1) * _norm(x, s).pow(2 - s)


@dataclass(frozen=True)
class ElasticRetention(Retention):
    """Elastic net: behind every chunk numbers within `threshold` of 0 become 0, and the others move towards 0 by it.

    Raises:
        ValueError: a negative threshold.
    """

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"ElasticRetention: threshold must be at least 0; got {self.threshold}")

    def border(self, before: Tensor, after: Tensor) -> Tensor:
        """The soft threshold of the accumulator."""
        return after.sign() * (after.abs() - self.threshold).relu()


@dataclass(frozen=True)
class SoftmaxRetention(Retention):
    """W = c softmax(A) over the inputs of every row: the KL gate. A is log weights, so that no logarithm is taken.

    Args:
        scale: c, what a row sums up to; the number of inputs when omitted, so that weights are 1 on average.

    Raises:
        ValueError: a scale that is not above 0.
    """

    scale: float | None = None
    linear = False

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"SoftmaxRetention: scale must be above 0; got {self.scale}")

    def weights(self, A: Tensor) -> Tensor:
        """All above 0; every row sums up to c."""
        return A.softmax(-1) * (A.shape[-1] if self.scale is None else self.scale)

    def start(self, W: Tensor) -> Tensor:
        """Log weights of positive weights; rows that sum up to something else are scaled."""
        return W.log()


@dataclass(frozen=True)
class RowNormRetention(Retention):
    """Behind every chunk each row of a matrix has the length that it had before it, as in LaCT."""

    def border(self, before: Tensor, after: Tensor) -> Tensor:
        """The new rows, at the lengths of the old ones."""
        lengths: Tensor = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
        own: Tensor = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
        return after * (lengths / (own + SMALLEST))


def _norm(A: Tensor, q: float) -> Tensor:
    """||A||_q over the last two dimensions, (..., 1, 1), at least SMALLEST."""
    if q == 4:
        return A.square().square().sum((-2, -1), keepdim=True).clamp_min(SMALLEST**4).sqrt().sqrt()
    return A.abs().pow(q).sum((-2, -1), keepdim=True).clamp_min(SMALLEST**q).pow(1 / q)
