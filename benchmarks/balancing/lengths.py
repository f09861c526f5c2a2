"""Lengths of documents in public corpora, sampled by the inverse of their distribution.

A corpus is known by a few quantiles; between two of them the logarithm of the length is linear in the logarithm of what
lies above, as in the power laws that such tails follow. (A log-normal fitted to the body misses the tail.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths.

    Args:
        quantiles: (share of documents that are at most so long, length), ascending from share 0. The last is the
            longest document; where its share is given as 1, a tenth of what lies above the one before it is as long.
    """

    quantiles: tuple[tuple[float, float], ...]

    def at(self, share: np.ndarray, cap: int | None = None) -> np.ndarray:
        """The length below which a `share` in [0, 1) of the documents of at most `cap` tokens lies, as int64."""
        p, lengths = (np.asarray(column, float) for column in zip(*self.quantiles, strict=True))
        depth = -np.log(np.maximum(1 - p, self._last))  # 0 at the start; grows into the tail
        log_length = np.log(lengths)
        share = np.asarray(share, float)
        if cap is not None and cap < lengths[-1]:
            share = share * (1 - np.exp(-np.interp(np.log(cap), log_length, depth)))
        drawn = np.exp(np.interp(-np.log1p(-share), depth, log_length))
        whole: np.ndarray = np.maximum(1, np.floor(drawn if cap is None else np.minimum(drawn, cap))).astype(np.int64)
        return whole

    def sample(self, n: int, rng: np.random.Generator, cap: int | None = None) -> np.ndarray:
        """n lengths of documents of at most `cap` tokens; longer ones are left out and not cut, (n,) int64."""
        return self.at(rng.random(n), cap)

    @property
    def _last(self) -> float:
        """The share of documents that are as long as the longest."""
        last = self.quantiles[-1][0]
        return 1 - last if last < 1 else (1 - self.quantiles[-2][0]) / 10


CORPORA: Mapping[str, Lengths] = MappingProxyType(
    {
        # a million documents: the file that FlexSP's authors published
        "wikipedia": Lengths(
            (
                (0.0, 16), (0.01, 39), (0.05, 67), (0.10, 87), (0.25, 146), (0.50, 347), (0.75, 862), (0.90, 2112),
                (0.95, 3721), (0.99, 10921), (0.995, 15987), (0.999, 37367), (0.9999, 102060), (0.999999, 1823777),
            )
        ),
        # histograms in LongCA-bench
        "prolong-64k": Lengths(
            (
                (0.0, 16), (0.05, 69), (0.25, 185), (0.50, 383), (0.75, 749), (0.90, 1441), (0.95, 2382),
                (0.9885, 8900), (0.9985, 50000), (1.0, 62000),
            )
        ),
        "prolong-512k": Lengths(
            ((0.0, 16), (0.50, 350), (0.90, 1279), (0.95, 2034), (0.99, 9203), (0.9927, 10900), (1.0, 476000))
        ),
        # the mix of MagiAttention's benchmark
        "magi": Lengths(
            (
                (0.0, 64), (0.468, 500), (0.714, 1000), (0.870, 2000), (0.944, 4000), (0.974, 8000), (0.987, 16000),
                (0.9956, 32000), (0.9970, 64000), (0.9986, 128000), (1.0, 196000),
            )
        ),
    }
)  # fmt: skip


def power_tail(
    n: int, rng: np.random.Generator, cap: int, *, share: float = 0.0016, start: float = 60e3, exponent: float = 1.25
) -> np.ndarray:
    """A log-normal(7.3, 1.35) body with a Pareto tail, at most `cap`: a stand-in for corpora with a few huge documents.

    The constants are ours, chosen near what ByteScale (arXiv 2502.21231) says of its internal data.
    """
    body = np.exp(rng.normal(7.3, 1.35, n))
    tail = start * (1 - rng.random(n)) ** (-1 / exponent)
    return np.clip(np.where(rng.random(n) < share, tail, body), 1, cap).astype(np.int64)
