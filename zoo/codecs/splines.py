"""Clamped B-splines on the phase from 0 to 1: knots, basis functions, and the ridge fit as one matrix."""

import torch
from torch import Tensor

__all__ = ["basis_matrix", "clamped_knots", "fit_matrix", "phases", "quantised", "second_control"]


def clamped_knots(n_controls: int, degree: int) -> Tensor:
    """Uniform knots on [0, 1] whose first and last stand `degree` + 1 times, (n_controls + degree + 1,) float64.

    A curve with these begins in its first control point and ends in its last. Of degree 0 they cut [0, 1] into
    `n_controls` equal pieces.
    """
    inner = torch.linspace(0, 1, n_controls - degree + 1, dtype=torch.float64)
    return torch.cat([inner.new_zeros(degree), inner, inner.new_ones(degree)])


def phases(steps: int) -> Tensor:
    """The phase of each of `steps` actions, both ends included, (steps,) float64; a single step is at 0."""
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def basis_matrix(phase: Tensor, knots: Tensor, degree: int) -> Tensor:
    """Values of the basis functions by the recursion of Cox and de Boor, (T, n_controls) float64.

    Rows sum to 1, and have at most `degree` + 1 entries that are not 0.

    Args:
        phase: (T,) in [0, 1].
        knots: (n_controls + degree + 1,), as of `clamped_knots`.
        degree: of the polynomials between two knots, at least 0.

    Source: de Boor, A Practical Guide to Splines (1978); arXiv 2506.06072, equations 2 and 3.
    """
    u, n_controls = phase.double()[:, None], len(knots) - degree - 1
    left, right = knots[:-1], knots[1:]
    last = (torch.arange(len(left)) == n_controls - 1) & (u == knots[-1])  # the last piece holds its right end
    basis = (((left <= u) & (u < right)) | last).double()
    for q in range(1, degree + 1):
        rising = _ratio(u - knots[: -q - 1], knots[q:-1] - knots[: -q - 1])
        falling = _ratio(knots[q + 1 :] - u, knots[q + 1 :] - knots[1:-q])
        basis = rising * basis[:, :-1] + falling * basis[:, 1:]
    return basis


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Their quotient, 0 where nothing is below: knots that coincide."""
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def fit_matrix(basis: Tensor, ridge: float) -> Tensor:
    """(B^T B + ridge I)^-1 B^T, by which values (T, D) become their control points (n_controls, D).

    Args:
        basis: B, (T, n_controls).
        ridge: at least 0; 0 is least squares, for T of at least n_controls.
    """
    gram = basis.T @ basis + ridge * torch.eye(basis.shape[1], dtype=basis.dtype)
    solved: Tensor = torch.linalg.solve(gram, basis.T)
    return solved


def second_control(knots: Tensor, degree: int, velocity: Tensor, steps: int) -> Tensor:
    """How far the second control point lies from the first, for a curve that begins with a velocity.

    Args:
        knots: as of `clamped_knots`.
        degree: at least 1.
        velocity: change from one step to the next, any shape.
        steps: of the whole curve.
    """
    return velocity * (steps - 1) * (knots[degree + 1] - knots[1]) / degree


def quantised(numbers: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The nearest of `bins` equally spaced numbers from `low` to `high`, both included, as int64 in [0, bins).

    A number outside goes to the nearer end. Halves are rounded to the even one. Where low equals high it is 0.
    """
    width = high - low
    share = ((numbers - low) / torch.where(width == 0, 1.0, width)).clamp(0, 1)
    return torch.where(width == 0, 0, (share * (bins - 1)).round().long())
