"""Chunks of actions as the control points of smooth curves: BEAST."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.codecs.action_chunks import ActionCodec
from zoo.codecs.codec import Codes, register_codec
from zoo.codecs.splines import basis_matrix, clamped_knots, fit_matrix, phases, quantised, second_control
from zoo.errors import UsageError, UserError

__all__ = ["BSplineCodec"]


@register_codec("bspline")
class BSplineCodec(ActionCodec):
    """Clamped B-splines: every dimension of a chunk of T actions becomes N control points, whatever T is.

    A step of the codes is a control point, and a dimension of the actions is a stream. Flattened they are in the
    paper's order: all dimensions of the first control point, then all of the second. Every id means something in every
    place, so no prediction can be malformed.

    Actions go to [-1, 1] by their quantiles. Control points are quantised between quantiles of their own, one pair for
    each of the N D places, since they leave [-1, 1]. All of these are learnt once and kept.

    Args:
        steps: T, actions of a chunk.
        n_controls: N, control points of each dimension, in (degree, steps].
        degree: of the polynomials, at least 0.
        bins: of every control point, the vocabulary's size, at least 2.
        grippers: dimensions that open and close: steps of N equal pieces (degree 0).
        ridge: keeps control points small, at least 0.
        cut: share of the actions on either side that lies outside [-1, 1] after normalisation.
        control_cut: share of the control points on either side that fit leaves outside; they are clipped.

    Without clipping, a decoded action differs from the fitted curve by at most half a bin of the widest range.

    Source: arXiv 2506.06072; phases as in the authors' code, both ends included.
    """

    def __init__(
        self,
        steps: int = 20,
        *,
        n_controls: int = 10,
        degree: int = 4,
        bins: int = 256,
        grippers: Sequence[int] = (),
        ridge: float = 1e-4,
        cut: float = 0.01,
        control_cut: float = 0.001,
    ):
        super().__init__(steps, cut=cut, grippers=grippers)
        if degree < 0:
            raise UsageError(f"degree must be at least 0, got {degree}")
        if not degree < n_controls <= steps:
            raise UsageError(
                f"n_controls must be above degree = {degree} and at most steps = {steps}, got {n_controls}"
            )
        if bins < 2:
            raise UsageError(f"bins must be at least 2, got {bins}")
        if not 0 <= ridge < float("inf"):
            raise UsageError(f"ridge must be at least 0 and finite, got {ridge}")
        if not 0 <= control_cut < 0.5:
            raise UsageError(f"control_cut must be in [0, 0.5), got {control_cut}")
        self.n_controls, self.degree, self.bins = n_controls, degree, bins
        self.ridge, self.control_cut = ridge, control_cut
        self.knots = clamped_knots(n_controls, degree)
        self._basis, self._steps_basis = self.bases(phases(steps))
        # fits with no, one and two control points held: those of the start, and of its velocity
        self._fits = [fit_matrix(self._basis[:, held:], ridge) for held in range(min(3, n_controls))]
        self._steps_fit = fit_matrix(self._steps_basis, ridge)
        self._bounds: Tensor | None = None  # (2, N, D) float64: the least and the largest control points

    def bases(self, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Basis functions at phases (T,) in [0, 1]: of smooth dimensions, and of grippers, (T, N) float64 each."""
        return (
            basis_matrix(phase, self.knots, self.degree),
            basis_matrix(phase, clamped_knots(self.n_controls, 0), 0),
        )

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: the bins of a control point."""
        return self.bins

    @property
    def streams(self) -> int:
        """D, dimensions of the actions."""
        return self.width

    def learn(self, chunks: Tensor) -> None:
        """The range of every control point."""
        ends = np.quantile(self._controls(chunks).numpy(), [self.control_cut, 1 - self.control_cut], axis=0)
        self._bounds = torch.from_numpy(ends)

    def controls(
        self, samples: Sequence[Tensor], *, start: Tensor | None = None, velocity: Tensor | None = None
    ) -> Tensor:
        """Control points (B, N, D), float64, of chunks (T, D), in normalised actions.

        Args:
            samples: the chunks.
            start: (B, D), actions in which the curves begin exactly; the other control points are fitted to the rest.
                Grippers begin where they begin.
            velocity: (B, D), with which they begin, in actions a step; with a start only.
        """
        return self._controls(self.chunks(samples), *self._held(start, velocity))

    def _held(self, start: Tensor | None, velocity: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Start and second control point, (B, D) each, normalised.

        Raises:
            UserError: a velocity without a start, of another size, or of a curve that has none.
        """
        if start is None:
            if velocity is not None:
                raise UserError("a velocity belongs to a start; got the velocity alone, give start as well")
            return None, None
        for name, given in (("start", start), ("velocity", velocity)):
            if given is not None and (given.ndim != 2 or given.shape[1] != self.width or len(given) != len(start)):
                raise UserError(
                    f"{name} must be (B, {self.width}), a row for each chunk; got {tuple(given.shape)}: give one "
                    "action a chunk"
                )
        first = self.normalised(start)
        if velocity is None:
            return first, None
        if self.degree < 1 or self.n_controls < 3:
            raise UserError(
                f"a velocity needs degree of at least 1 and n_controls of at least 3; got {self.degree} and "
                f"{self.n_controls}: leave the velocity out"
            )
        slope = self.normalised(start + velocity) - first
        return first, first + second_control(self.knots, self.degree, slope, self.steps)

    def _controls(self, chunks: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        held = [each for each in (first, second) if each is not None]
        fixed = torch.stack(held, 1) if held else chunks[:, :0]  # (B, held, D)
        if len(fixed) != len(chunks):
            raise UserError(f"start must have a row for each of {len(chunks)} chunks; got {len(fixed)}: give one each")
        if len(held) == self.n_controls:
            controls = fixed
        else:
            rest = chunks - self._basis[:, : len(held)] @ fixed
            controls = torch.cat([fixed, self._fits[len(held)] @ rest], 1)
        return self._with_grippers(controls, self._steps_fit @ chunks)

    def _with_grippers(self, smooth: Tensor, steps: Tensor) -> Tensor:
        """(B, _, D) with the dimensions of the grippers taken from the second."""
        if not self.grippers:
            return smooth
        index = list(self.grippers)
        smooth = smooth.clone()
        smooth[..., index] = steps[..., index]
        return smooth

    def encode(
        self, samples: Sequence[Tensor], *, start: Tensor | None = None, velocity: Tensor | None = None
    ) -> Codes:
        """Ids (B, N, D) of chunks (T, D), or (B, N) of one dimension; `start` and `velocity` as in `controls`.

        Raises:
            UserError: nothing is fitted; a chunk is of another size; an action is not finite.
        """
        low, high = self._bounded()
        ids = quantised(self.controls(samples, start=start, velocity=velocity), low, high, self.bins)
        ids = ids.squeeze(2) if self.width == 1 else ids
        return Codes(ids, torch.full((len(ids),), self.n_controls, dtype=torch.long))

    def decode(
        self,
        codes: Codes,
        *,
        steps: int | None = None,
        start: Tensor | None = None,
        velocity: Tensor | None = None,
    ) -> list[Tensor]:
        """Chunks (steps, D), float64, of ids (B, N, D).

        Args:
            codes: of `encode`, or a model's prediction.
            steps: actions from the beginning to the end of the same time; T when omitted.
            start: (B, D), actions in which the curves begin exactly: the last one that was executed.
            velocity: (B, D), with which they begin, in actions a step.

        Raises:
            UserError: the ids have another size, or are no ids of the vocabulary.
        """
        low, high = self._bounded()
        ids = codes.ids.unsqueeze(2) if codes.ids.ndim == 2 and self.width == 1 else codes.ids
        if ids.shape[1:] != (self.n_controls, self.width):
            raise UserError(
                f"ids must be (B, {self.n_controls}, {self.width}), control points by dimensions; got "
                f"{tuple(codes.ids.shape)}: give those of this codec"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.bins:
            raise UserError(
                f"ids must be in [0, {self.bins}); got {int(ids.min())} to {int(ids.max())}: choose among the bins only"
            )
        controls = low + ids.double() / (self.bins - 1) * (high - low)
        return self._curves(controls, steps, start, velocity)

    def _curves(
        self, controls: Tensor, steps: int | None, start: Tensor | None, velocity: Tensor | None
    ) -> list[Tensor]:
        held, grippers = controls.clone(), controls
        for i, each in enumerate(self._held(start, velocity)):
            if each is not None:
                held[:, i] = each
        smooth, stepwise = (self._basis, self._steps_basis) if steps is None else self.bases(phases(steps))
        return list(self.restored(self._with_grippers(smooth @ held, stepwise @ grippers)).unbind(0))

    def vectors(self, samples: Sequence[Tensor], *, start: Tensor | None = None) -> Tensor:
        """Continuous tokens (B, N, D), float64: control points whose range is [-1, 1]; none is clipped."""
        low, high = self._bounded()
        width = torch.where(high == low, 1.0, high - low)
        return 2 * (self.controls(samples, start=start) - low) / width - 1

    def from_vectors(
        self, vectors: Tensor, *, steps: int | None = None, start: Tensor | None = None, velocity: Tensor | None = None
    ) -> list[Tensor]:
        """Chunks (steps, D), float64, of continuous tokens (B, N, D); the rest as in `decode`."""
        low, high = self._bounded()
        if vectors.shape[1:] != (self.n_controls, self.width):
            raise UserError(
                f"vectors must be (B, {self.n_controls}, {self.width}), control points by dimensions; got "
                f"{tuple(vectors.shape)}: give those of this codec"
            )
        width = torch.where(high == low, 1.0, high - low)
        return self._curves(low + (vectors.double() + 1) / 2 * width, steps, start, velocity)

    def clipped(self, samples: Sequence[Tensor]) -> float:
        """The share of the control points that lie outside the range that was learnt."""
        (low, high), controls = self._bounded(), self.controls(samples)
        return float(((controls < low) | (controls > high)).double().mean())

    def settings(self) -> dict[str, Any]:
        """What is written to JSON: plain values."""
        return super().settings() | {
            "n_controls": self.n_controls, "degree": self.degree, "bins": self.bins, "ridge": self.ridge,
            "control_cut": self.control_cut,
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """What is written to safetensors: the ranges of actions and of control points, and the knots."""
        if self._bounds is None:
            return {}
        return super().tensors() | {"bounds": self._bounds, "knots": self.knots}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: its curves have other knots.
        """
        if not torch.equal(tensors["knots"], self.knots):
            raise ValueError("its knots are not those of its settings")
        super().restore(tensors)
        self._bounds = tensors["bounds"]

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """The least and the largest control points, (N, D) each."""
        self._fitted()
        assert self._bounds is not None
        low, high = self._bounds
        return low, high
