"""What codecs of actions share: chunks of one size, checked, and every dimension brought to [-1, 1]."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from zoo.codecs.codec import Codes, StoredCodec
from zoo.errors import UsageError, UserError

__all__ = ["ActionCodec"]


class ActionCodec(StoredCodec):
    """A codec of chunks of actions, (steps, D) each: what the actions of a robot are for the next `steps` steps.

    A subclass learns in `learn`, from normalised chunks. `encode` and `decode` are its own.

    Args:
        steps: T, actions of a chunk.
        cut: share of the actions on either side that lies outside [-1, 1] after normalisation.
        grippers: dimensions that open and close; their least and largest numbers go to -1 and 1.

    Raises:
        UsageError: a setting is out of its range.
    """

    def __init__(self, steps: int, *, cut: float, grippers: Sequence[int] = ()):
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        if not 0 <= cut < 0.5:
            raise UsageError(f"cut must be in [0, 0.5), got {cut}")
        if len(set(grippers)) != len(grippers) or any(d < 0 for d in grippers):
            raise UsageError(f"grippers must be different dimensions from 0 on, got {list(grippers)}")
        self.steps, self.cut, self.grippers = steps, cut, tuple(grippers)
        self._range: Tensor | None = None  # (2, D) float64: what goes to -1 and to 1

    def learn(self, chunks: Tensor) -> None:
        """Learn from normalised chunks (B, T, D), float64, whatever else there is to learn."""
        raise NotImplementedError(f"{type(self).__name__} says what it learns by learn(chunks)")

    def decode(self, codes: Codes) -> list[Tensor]:
        """Chunks (T, D), float64, of ids."""
        raise NotImplementedError(f"{type(self).__name__} says what ids mean by decode(codes)")

    def encode(self, samples: Sequence[Tensor]) -> Codes:
        """Ids of chunks (T, D)."""
        raise NotImplementedError(f"{type(self).__name__} says what chunks become by encode(samples)")

    @property
    def width(self) -> int:
        """D, the numbers of an action."""
        return self._fitted().shape[1]

    def fit(self, samples: Iterable[Tensor]) -> Self:
        """Learn from chunks (T, D), and be frozen.

        Raises:
            UserError: the codec is fitted; there is no chunk, or one of another size; an action is not finite; a
                dimension does not move.
        """
        if self._range is not None:
            raise UserError(f"a codec is fitted once, and this {type(self).__name__} is; make another one")
        chunks = self._stacked(list(samples), None)
        if not len(chunks):
            raise UserError(f"a codec is fitted on chunks of actions; got none, give tensors of ({self.steps}, D)")
        if any(d >= chunks.shape[2] for d in self.grippers):
            raise UserError(
                f"grippers must be dimensions of the actions, of which there are {chunks.shape[2]}; got "
                f"{list(self.grippers)}: leave out the others"
            )
        ends = self._ends(chunks.flatten(0, 1).numpy())
        self._range = ends
        try:
            self.learn(self.normalised(chunks))
        except UserError:
            self._range = None
            raise
        return self

    def _ends(self, actions: np.ndarray) -> Tensor:
        ends = np.quantile(actions, [self.cut, 1 - self.cut], axis=0)
        least, largest = actions.min(axis=0), actions.max(axis=0)
        for d in self.grippers:
            ends[:, d] = least[d], largest[d]
        for d, (low, high) in enumerate(ends.T):
            if least[d] == largest[d]:
                raise UserError(
                    f"every dimension of the actions must move; dimension {d} is {least[d]:g} everywhere: leave it out"
                )
            if low == high:
                raise UserError(
                    f"a dimension must move in more than {self.cut:g} of the actions at either end; dimension {d} is "
                    f"nearly always {low:g}: name it in grippers, or lower cut"
                )
        return torch.from_numpy(ends)

    def normalised(self, actions: Tensor) -> Tensor:
        """Actions (..., D) as float64 numbers, mostly in [-1, 1]."""
        low, high = self._fitted()
        numbers: Tensor = 2 * (actions.double() - low) / (high - low) - 1
        return numbers

    def restored(self, numbers: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        low, high = self._fitted()
        actions: Tensor = low + (numbers.double() + 1) / 2 * (high - low)
        return actions

    def chunks(self, samples: Sequence[Tensor]) -> Tensor:
        """Samples as one normalised tensor (B, T, D), float64.

        Raises:
            UserError: nothing is fitted; a chunk is of another size; an action is not finite.
        """
        return self.normalised(self._stacked(samples, self.width))

    def _stacked(self, samples: Sequence[Tensor], width: int | None) -> Tensor:
        """Chunks side by side, float64. The first says the width where nobody knows it."""
        for i, chunk in enumerate(samples):
            width = chunk.shape[-1] if width is None and chunk.ndim else width
            if tuple(chunk.shape) != (self.steps, width):
                raise UserError(
                    f"a chunk must be ({self.steps}, {'D' if width is None else width}), steps by dimensions; chunk "
                    f"{i} is {tuple(chunk.shape)}: cut the actions into such chunks"
                )
            if not bool(torch.isfinite(chunk).all()):
                step, d = (~torch.isfinite(chunk)).nonzero()[0].tolist()
                raise UserError(
                    f"actions must be finite; chunk {i} has {chunk[step, d].item()} at step {step} in dimension {d}: "
                    "leave the chunk out"
                )
        if not samples:
            return torch.zeros(0, self.steps, width or 0, dtype=torch.float64)
        return torch.stack([chunk.double().cpu() for chunk in samples])

    def errors(self, samples: Sequence[Tensor]) -> Mapping[str, float]:
        """What the round trip costs, in the units of the actions.

        `rmse`: root of the mean squared difference; `rmse_D`: that of each dimension; `largest`: the largest
        difference; `clipped`: the share of the numbers behind the tokens that lie outside the range that was learnt.
        """
        given = self._stacked(samples, self.width)
        if not len(given):
            return {}
        difference = torch.stack(self.decode(self.encode(samples))) - given
        each = difference.square().mean((0, 1)).sqrt().tolist()
        return {
            "rmse": float(difference.square().mean().sqrt()),
            **{f"rmse_{d}": value for d, value in enumerate(each)},
            "largest": float(difference.abs().max()),
            "clipped": self.clipped(samples),
        }

    def clipped(self, samples: Sequence[Tensor]) -> float:
        """The share of the numbers behind the tokens that lie outside the range that was learnt."""
        raise NotImplementedError(f"{type(self).__name__} says what it clips by clipped(samples)")

    def settings(self) -> dict[str, Any]:
        """What is written to JSON: plain values."""
        return {"steps": self.steps, "cut": self.cut, "grippers": list(self.grippers)}

    def tensors(self) -> dict[str, Tensor]:
        """What is written to safetensors: the actions that go to -1 and to 1."""
        return {} if self._range is None else {"range": self._range}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self._range = tensors["range"]

    def _fitted(self) -> Tensor:
        if self._range is None:
            raise UserError(f"a codec is used after fit; this {type(self).__name__} has learnt nothing yet")
        return self._range
