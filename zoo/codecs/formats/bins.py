"""Series of numbers as ids: every channel cut into bins of equal width."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from zoo.codecs.codec import Codes, StoredCodec, padded, register_codec
from zoo.errors import UsageError, UserError

__all__ = ["BinsCodec"]


@register_codec("bins")
class BinsCodec(StoredCodec):
    """Uniform bins between two quantiles of each channel; a channel is a stream.

    A number outside falls into the nearest bin. A bin comes back as its centre.

    Args:
        bins: of every channel, the vocabulary's size, at least 2.
        cut: share of the numbers on either side that fit leaves outside, in [0, 0.5).

    Source: RT-2, arXiv 2307.15818 (256 bins); OpenVLA, arXiv 2406.09246 (quantiles of 1 % and 99 %).
    """

    def __init__(self, bins: int = 256, *, cut: float = 0.01):
        if bins < 2:
            raise UsageError(f"bins must be at least 2, got {bins}")
        if not 0 <= cut < 0.5:
            raise UsageError(f"cut must be in [0, 0.5), got {cut}")
        self.bins, self.cut = bins, cut
        self._ends: Tensor | None = None  # (2, streams), float64: the least and the largest number inside

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: the bins of a channel."""
        return self.bins

    @property
    def streams(self) -> int:
        """Channels of a series, one token each in every step."""
        return self._fitted().shape[1]

    def fit(self, samples: Iterable[Tensor]) -> Self:
        """Learn the ends of every channel from series (T_i, streams).

        Raises:
            UserError: the codec is fitted, or there is no number.
        """
        if self._ends is not None:
            raise UserError("a codec is fitted once, and this BinsCodec has its bins; make another one")
        rows = _checked(samples, None)
        if not sum(map(len, rows)):
            raise UserError("bins are fitted on numbers; got none, give series of (T, channels)")
        self._ends = torch.cat(rows).quantile(torch.tensor([self.cut, 1 - self.cut], dtype=torch.float64), dim=0)
        return self

    def encode(self, samples: Sequence[Tensor]) -> Codes:
        """Ids (B, L, streams) of series (T_i, streams).

        Raises:
            UserError: nothing is fitted; a series has other channels, or a number that is not finite.
        """
        least, largest = self._fitted()
        width = (largest - least).clamp(min=torch.finfo(torch.float64).tiny)
        rows = [((series - least) / width * self.bins).floor() for series in _checked(samples, self.streams)]
        return padded([row.clamp(0, self.bins - 1).long() for row in rows])

    def decode(self, codes: Codes) -> list[Tensor]:
        """Series (T_i, streams), float64: the centres of the bins."""
        least, largest = self._fitted()
        numbers = least + (codes.ids.double() + 0.5) / self.bins * (largest - least)
        return [row[:length] for row, length in zip(numbers, codes.lengths.tolist(), strict=True)]

    def errors(self, samples: Sequence[Tensor]) -> Mapping[str, float]:
        """`rmse`: root of the mean squared difference; `outside`: the share of numbers that no bin holds."""
        least, largest = self._fitted()
        given, back = torch.cat([series.double() for series in samples]), torch.cat(self.decode(self.encode(samples)))
        outside = (given < least) | (given > largest)
        return {"rmse": float((given - back).square().mean().sqrt()), "outside": float(outside.double().mean())}

    def settings(self) -> dict[str, Any]:
        """What is written to JSON: plain values."""
        return {"bins": self.bins, "cut": self.cut}

    def tensors(self) -> dict[str, Tensor]:
        """What is written to safetensors: the ends of every channel's range."""
        return {} if self._ends is None else {"ends": self._ends}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self._ends = tensors["ends"]

    def _fitted(self) -> Tensor:
        if self._ends is None:
            raise UserError("a codec is used after fit; this BinsCodec has no bins yet")
        return self._ends


def _checked(samples: Iterable[Tensor], channels: int | None) -> list[Tensor]:
    """Series as float64; the first says the channels where nobody knows them."""
    rows: list[Tensor] = []
    for i, series in enumerate(samples):
        channels = series.shape[-1] if channels is None and series.ndim else channels
        if series.ndim != 2 or series.shape[1] != channels:
            raise UserError(
                f"a series must be (T, {'streams' if channels is None else channels}), steps by channels; series {i} "
                f"is {tuple(series.shape)}: give the same channels everywhere"
            )
        if not bool(torch.isfinite(series).all()):
            step, channel = (~torch.isfinite(series)).nonzero()[0].tolist()
            raise UserError(
                f"numbers must be finite; series {i} has {series[step, channel].item()} in channel {channel}: leave it "
                "out"
            )
        rows.append(series.double())
    return rows
