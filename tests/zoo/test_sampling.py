"""What top_k and top_p leave to draw from, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.decoding import sample

DRAWS = 4000  # a token of probability 0.02 is missed by all of them with odds of 1e-35


def drawn(probabilities: list[float], **cut: float) -> Tensor:
    """How often each token is drawn."""
    logits = torch.tensor(probabilities).log().expand(DRAWS, -1)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0), **cut)  # type: ignore[arg-type]
    return torch.bincount(tokens, minlength=len(probabilities))


def kept(probabilities: list[float], **cut: float) -> set[int]:
    return set(drawn(probabilities, **cut).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("top_p", "want"),
    [
        (0.05, {2}),  # at least the most likely one
        (0.39, {2}),
        (0.41, {0, 2}),
        (0.69, {0, 2}),
        (0.71, {0, 2, 3}),
        (0.89, {0, 2, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, want: set[int]) -> None:
    assert kept([0.3, 0.1, 0.4, 0.2], top_p=top_p) == want


def test_top_p_that_is_reached_exactly_keeps_no_more() -> None:
    """Four equal probabilities are exact: two of them are one half."""
    for n in (1, 2, 3, 4):
        assert len(kept([0.25] * 4, top_p=n / 4)) == n


@pytest.mark.parametrize(
    ("top_k", "want"), [(1, {2}), (2, {0, 2}), (3, {0, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_most_likely(top_k: int, want: set[int]) -> None:
    assert kept([0.3, 0.1, 0.4, 0.2], top_k=top_k) == want


def test_top_p_counts_what_top_k_has_left() -> None:
    """Of 0.4, 0.3 the first has 4 / 7 = 0.571."""
    assert kept([0.3, 0.1, 0.4, 0.2], top_k=2, top_p=0.57) == {2}
    assert kept([0.3, 0.1, 0.4, 0.2], top_k=2, top_p=0.58) == {0, 2}


def test_what_is_left_keeps_its_odds() -> None:
    counts = drawn([0.3, 0.1, 0.4, 0.2], top_p=0.8)
    for token, odds in ((0, 3 / 9), (1, 0.0), (2, 4 / 9), (3, 2 / 9)):
        assert abs(counts[token] / DRAWS - odds) < 5 * math.sqrt(odds * (1 - odds) / DRAWS) + 1e-9


def test_temperature_sharpens_and_flattens() -> None:
    """Probabilities to the power of 1 / temperature: 0.8, 0.2 become 16 / 17, 1 / 17 and 2 / 3, 1 / 3."""
    for temperature, odds in ((0.5, 16 / 17), (1.0, 0.8), (2.0, 2 / 3)):
        share = drawn([0.8, 0.2], temperature=temperature)[0] / DRAWS
        assert abs(share - odds) < 5 * math.sqrt(odds * (1 - odds) / DRAWS)
    assert kept([0.3, 0.1, 0.4, 0.2], temperature=0.0) == {2}


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=7), half=st.integers(0, 40))
def test_top_p_is_the_definition(weights: list[int], half: int) -> None:
    """Cuts between the sums that there can be, so that rounding plays no part."""
    total = sum(weights)
    top_p = (half % total + 0.5) / total
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    sums = [sum(weights[i] for i in order[: n + 1]) for n in range(len(order))]
    want = set(order[: 1 + next(n for n, reached in enumerate(sums) if reached >= top_p * total)])
    assert kept([weight / total for weight in weights], top_p=top_p) == want
