"""Attention's cache: slots in place for one holder, values for everybody else, windows with bounded memory."""

import pytest
import torch
from case_table import D
from torch.testing import assert_close

from zoo.layers import Attention
from zoo.layers.kv_cache import STEP, AttentionSlots, values

WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 5])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixer(window: int | None) -> Attention:
    torch.manual_seed(0)
    return Attention(D, n_heads=2, window=window).double()


@WINDOWS
@pytest.mark.parametrize("lengths", [(1, 9, 4), (3, 3, 3), (0, 1, 9)])
def test_reserved_rows_of_different_lengths_go_on_as_values_do(window: int | None, lengths: tuple[int, ...]) -> None:
    layer, x, bounds = mixer(window), random(1, sum(lengths), D), torch.tensor([0, *lengths]).cumsum(0)
    _, state = layer(x, cu_seqlens=bounds)
    own = layer.reserve(state, 40)
    for step in range(12):  # single tokens, and a ragged call in between
        if step == 5:
            more, cuts = random(1, 4, D), torch.tensor([0, 3, 3, 4])
            want, state = layer(more, state, cu_seqlens=cuts)
            got, own = layer(more, layer.reserve(own, 40), cu_seqlens=cuts)
        else:
            token = random(3, 1, D) + step
            want, state = layer(token, state)
            got, own = layer(token, layer.reserve(own, 40))
        assert_close(got, want)
        assert torch.equal(own.length, state.length)
    if window is not None:
        assert own.k.shape[1] <= window


def test_a_reserved_cache_is_written_in_place_and_grows_by_a_quarter() -> None:
    layer, copies, places = mixer(None), 0, set()
    _, state = layer(random(2, 10, D))
    for length in range(11, 1500):
        state = layer.reserve(state, length)
        copies += state.k.data_ptr() not in places
        places.add(state.k.data_ptr())
        _, state = layer(random(2, 1, D), state)
    assert isinstance(state, AttentionSlots)
    assert state.k.shape[1] <= 1.25 * 1500 + 2 * STEP
    assert copies <= 15, "amortised: a quarter more each time"


def test_what_a_holder_gave_away_stays() -> None:
    layer = mixer(None)
    _, state = layer(random(2, 10, D))
    own = layer.reserve(state, 30)
    given = values((own,))[0]
    kept = [z[:, :10].clone() for z in given[:2]]
    _, later = layer(random(2, 3, D), own)
    assert later.k.data_ptr() == own.k.data_ptr()
    assert all(torch.equal(z[:, :10], k) for z, k in zip(given[:2], kept, strict=True))
    before = later.k.clone()
    layer(random(2, 3, D) + 1, given)  # a value is copied, so the holder's slots are left alone
    assert torch.equal(later.k, before)


@WINDOWS
def test_every_prefix_of_a_call_is_there(window: int | None) -> None:
    layer, x, cuts = mixer(window), random(1, 13, D), torch.tensor([0, 7, 7, 13])
    _, state = layer(random(3, 4, D))
    _, prefixes = layer.look_ahead(x, state, cu_seqlens=cuts)
    token = random(3, 1, D)
    for n in ([0, 0, 0], [7, 0, 6], [1, 0, 5], [6, 0, 1], [3, 0, 0]):
        part = torch.cat([x[:, cut : cut + m] for cut, m in zip(cuts, n, strict=False)], dim=1)
        _, want = layer(part, state, cu_seqlens=torch.tensor([0, *n]).cumsum(0))
        assert_close(layer(token, prefixes.at(torch.tensor(n)))[0], layer(token, want)[0])
