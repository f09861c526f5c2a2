"""Learning algorithms: what becomes of the gradients of tokens before they reach the accumulator."""

from dataclasses import dataclass

from torch import Tensor


class Algorithm:
    """A_t = a_t A_{t-1} - eta_t grad_t; a subclass says what differs.

    momentum: a running sum of gradients, which decays by the gate `theta`, stands in their place.
    by_chunk: the sum of a chunk's gradients is changed as a whole, so that tokens inside it read the weights before it.
    """

    momentum: bool = False
    by_chunk: bool = False

    def update(self, total: Tensor) -> Tensor:
        """What is taken from the accumulator for a chunk's weighted sum of gradients (..., out, in)."""
        return total


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """A_t = a_t A_{t-1} - eta_t grad_t, one step a token."""


@dataclass(frozen=True)
class Momentum(Algorithm):
    """S_t = theta_t S_{t-1} - eta_t grad_t and A_t = a_t A_{t-1} + S_t, as in Titans."""

    momentum = True


@dataclass(frozen=True)
class Muon(Algorithm):
    """The sum of a chunk's gradients, with its singular values brought near 1 by Newton-Schulz iterations.

    Args:
        steps: iterations; matrix products alone.

    Raises:
        ValueError: less than one step.

    Source: Jordan et al. 2024; in a memory, arXiv 2505.23884.
    """

    steps: int = 5
    by_chunk = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Muon: steps must be at least 1; got {self.steps}")

    def update(self, total: Tensor) -> Tensor:
        """About U V^T of the sum's singular value decomposition U S V^T."""
        tall = total.shape[-2] > total.shape[-1]
        X = total.mT if tall else total
        X = X * (X.square().sum((-2, -1), keepdim=True) + TINY).rsqrt()
        for _ in range(self.steps):
            S = X @ X.mT
            X = COEFFICIENTS[0] * X + (COEFFICIENTS[1] * S + COEFFICIENTS[2] * (S @ S)) @ X
        return X.mT if tall else X


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the public optimiser: steep at 0, near 1 after five steps
TINY = 1e-14  # under the root: a chunk without gradients has an update of zero, and a slope
