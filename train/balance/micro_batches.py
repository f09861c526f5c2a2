"""Cutting a batch into micro-batches, and lengths into buckets: two exact dynamic programmes of FlexSP
(arXiv 2412.01523, sections 4.2 and 4.3), both over consecutive parts of what they are given."""

import itertools

import numpy as np


def consecutive_parts(tokens: np.ndarray, parts: int) -> list[int]:
    """Cut a row of numbers into at most `parts` consecutive parts so that the largest sum is as small as it can be.

    Args:
        tokens: (n,) integers of at least 1; sorted, neighbours of like length share a part.
        parts: at least 1.

    Returns:
        Boundaries 0 = c_0 < ... < c_m = n with m <= parts.

    Cost: O(log(sum) parts log n): the bound is found by bisection, since filling greedily needs the fewest parts.
    """
    total = np.concatenate([[0], np.cumsum(tokens)])
    low, high = int(max(tokens.max(), -(-int(total[-1]) // parts))), int(total[-1])
    while low < high:
        middle = (low + high) // 2
        if len(_filled(total, middle)) - 1 <= parts:
            high = middle
        else:
            low = middle + 1
    return _filled(total, low)


def _filled(total: np.ndarray, bound: int) -> list[int]:
    """Boundaries when every part takes all that fits below the bound."""
    cuts = [0]
    while cuts[-1] < len(total) - 1:
        cuts.append(int(np.searchsorted(total, total[cuts[-1]] + bound, side="right")) - 1)
    return cuts


def buckets(lengths: np.ndarray, count: int) -> list[int]:
    """Cut sorted lengths into at most `count` buckets so that rounding all up to their bucket's largest adds least.

    Args:
        lengths: (n,) ascending integers.
        count: at least 1.

    Returns:
        Boundaries 0 = c_0 < ... < c_m = n; bucket i is lengths[c_i : c_{i+1}], its length lengths[c_{i+1} - 1].

    Cost: O(n^2 count), vectorised over n.
    """
    n = len(lengths)
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.arange(1, n + 1)
    # added[j, k - 1] = sum over i in (j, k] of s_k - s_i
    added = (ends[None] - np.arange(n)[:, None]) * lengths[None] - (total[1:][None] - total[:n][:, None])
    added = np.where(ends[None] > np.arange(n)[:, None], added.astype(float), np.inf)
    error = np.concatenate([[0.0], np.full(n, np.inf)])
    froms = []
    for _ in range(min(count, n)):
        through = error[:n, None] + added
        froms.append(through.argmin(axis=0))
        error = np.concatenate([[0.0], through.min(axis=0)])
    cuts, k = [n], n
    for step in reversed(froms):
        if k > 0:
            k = int(step[k - 1])
            cuts.append(k)
    return cuts[::-1]


def rounding_error(lengths: np.ndarray, cuts: list[int]) -> int:
    """Tokens that rounding up to the buckets' largest lengths adds."""
    parts = [lengths[i:j] for i, j in itertools.pairwise(cuts)]
    return int(sum(part[-1] * len(part) - part.sum() for part in parts))
