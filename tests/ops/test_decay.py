"""Sums over the places of a chunk, against loops."""

import torch

from zoo.ops.core.decay import across, sum_before, sum_from


def test_sums_before_and_from_a_place() -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    for m in range(5):
        torch.testing.assert_close(sum_before(x)[:, m], x[:, :m].sum(1))
        torch.testing.assert_close(sum_from(x)[:, m], x[:, m:].sum(1))


def test_sums_over_the_pairs_around_a_place() -> None:
    pairs = torch.randn(2, 5, 5, dtype=torch.float64)
    for t in range(5):
        torch.testing.assert_close(across(pairs)[:, t], pairs[:, t:, :t].sum((1, 2)))
