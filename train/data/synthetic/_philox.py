"""Philox-4x32-10, vectorised: random numbers by address instead of by turn.

J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Every sample has counters of its own, so a
sample is the same on every rank, in every worker and after every restart, and a whole batch is made at once.
"""

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, key: int) -> np.ndarray:
    """Ten rounds over counters of four 32-bit words (uint64 arrays that broadcast); returns (..., 4) uint64."""
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


class Draws:
    """The random numbers of a batch of samples, (B, n) at a time; a sample's depend on its own index alone.

    Args:
        seed: the run's seed, up to 64 bits.
        stream: keeps uses of one seed apart, such as training and validation.
        indices: the samples, (B,), below 2**63.
    """

    def __init__(self, seed: int, stream: int, indices: np.ndarray):
        index = indices.astype(np.uint64)[:, None]
        self.count = len(indices)
        self._key, self._stream = seed & 0xFFFFFFFFFFFFFFFF, np.uint64(stream)
        self._low, self._high = index & _LOW, index >> _SHIFT
        self._used = 0

    def bits(self, n: int) -> np.ndarray:
        """32 random bits each, (B, n) uint64; further calls give further numbers."""
        blocks = -(-n // 4)
        counter = np.arange(self._used, self._used + blocks, dtype=np.uint64)[None]
        self._used += blocks
        words = philox(counter, np.full_like(counter, self._stream), self._low, self._high, self._key)
        return words.reshape(len(self._low), 4 * blocks)[:, :n]

    def uniform(self, n: int) -> np.ndarray:
        """Numbers in (0, 1), (B, n) float64."""
        return (self.bits(n) + 0.5) / 2.0**32

    def integers(self, bound: int | np.ndarray, n: int) -> np.ndarray:
        """Integers in [0, bound), (B, n) int64; the bias is below bound / 2**32."""
        return ((self.bits(n) * np.asarray(bound, np.uint64)) >> _SHIFT).astype(np.int64)

    def choice(self, options: int, n: int) -> np.ndarray:
        """n different ones of [0, options) in random order, (B, n) int64: the start of a Fisher-Yates shuffle."""
        rows = np.arange(len(self._low))
        pool = np.tile(np.arange(options), (len(rows), 1))
        swaps = np.arange(n) + self.integers(options - np.arange(n), n)
        for i in range(n):
            j = swaps[:, i]
            pool[:, i], pool[rows, j] = pool[rows, j], pool[:, i].copy()
        return pool[:, :n]

    def weighted_choice(self, weights: np.ndarray, n: int) -> np.ndarray:
        """n different ones of [0, len(weights)), (B, n) int64: one after another, each with the odds of what is left.

        By an exponential race: the first n to arrive, in order, when i arrives at rate weights[i].
        """
        arrival = -np.log(self.uniform(len(weights))) / weights
        return np.argsort(arrival, axis=1, kind="stable")[:, :n]
