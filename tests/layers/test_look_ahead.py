"""Every mixer's way back: the state after any prefix of a ragged call is that of a fresh call over the prefix."""

import pytest
import torch
from case_table import D, make_mixer, mixers, parametrize
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.layers import Attention, ShortConvolution
from zoo.layers.state import Replay, flatten, join, look_ahead, map_state, repeat, select, state_bytes, unflatten

CAUSAL = mixers(bidirectional=False)
LENGTHS = (7, 3, 0, 5)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@parametrize("name", CAUSAL)
@pytest.mark.parametrize("n", [(7, 3, 0, 5), (0, 0, 0, 0), (7, 1, 0, 2), (0, 3, 0, 4), (1, 0, 0, 0)])
def test_the_state_after_any_prefix(name: str, n: tuple[int, ...]) -> None:
    mixer, x, cuts = make_mixer(name), random(1, sum(LENGTHS), D), bounds(LENGTHS)
    _, state = mixer(random(4, 6, D, seed=2))
    kept = map_state(torch.clone, state)
    y, prefixes = look_ahead(mixer, x, state, cu_seqlens=cuts)
    assert_close(y, mixer(x, state, cu_seqlens=cuts)[0])
    part = torch.cat([x[:, cut : cut + m] for cut, m in zip(cuts, n, strict=False)], dim=1)
    _, fresh = mixer(part, state, cu_seqlens=bounds(n)) if any(n) else (None, state)
    more = random(4, 2, D, seed=3)
    assert_close(mixer(more, prefixes.at(torch.tensor(n)))[0], mixer(more, fresh)[0])
    assert_close(mixer(more, prefixes.at(prefixes.lengths))[0], mixer(more, mixer(x, state, cu_seqlens=cuts)[1])[0])
    assert torch.equal(prefixes.lengths, torch.tensor(LENGTHS))
    assert prefixes.nbytes() >= 0
    assert all(map(torch.equal, flatten(state).values(), flatten(kept).values())), "a state is a value"


def test_who_has_a_way_of_its_own() -> None:
    """Attention and convolutions crop; a mixer that says nothing, a third party's too, is run again."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
            sums = [part.sum(1) for part in x.split(cu_seqlens.diff().tolist(), dim=1)]
            return x, state + torch.cat(sums)

    x, cuts = random(1, 5, D), torch.tensor([0, 3, 5])
    _, prefixes = look_ahead(Sum(), x, torch.zeros(2, D).double(), cu_seqlens=cuts)
    assert isinstance(prefixes, Replay)
    assert_close(prefixes.at(torch.tensor([2, 0])), torch.stack([x[0, :2].sum(0), torch.zeros(D).double()]))
    for mixer in (Attention(D, n_heads=2).double(), ShortConvolution(D, 4).double()):
        _, prefixes = look_ahead(mixer, x, mixer.init_state(2), cu_seqlens=cuts)
        assert not isinstance(prefixes, Replay)


@parametrize("name", CAUSAL)
def test_rows_of_a_state_move_together(name: str) -> None:
    mixer, x = make_mixer(name), random(3, 6, D)
    _, state = mixer(x)
    token = random(3, 1, D, seed=2)
    want = mixer(token, state)[0]
    assert_close(mixer(token[[2, 0, 0]], select(state, torch.tensor([2, 0, 0])))[0], want[[2, 0, 0]])
    twice = torch.tensor([0, 0, 1, 1, 2, 2])
    assert_close(mixer(token[twice], repeat(state, 2))[0], want[twice])
    _, long = mixer(random(2, 9, D, seed=5))
    both = join([state, long])
    assert_close(mixer(random(5, 1, D), both)[0][3:], mixer(random(5, 1, D)[3:], long)[0])
    assert_close(mixer(random(5, 1, D), both)[0][:3], mixer(random(5, 1, D)[:3], state)[0])


@parametrize("name", CAUSAL)
def test_a_state_as_names_and_tensors_and_back(name: str) -> None:
    mixer = make_mixer(name)
    state = mixer.init_state(2)
    named = flatten(state)
    back = unflatten(state, named)
    assert type(back) is type(state)
    assert sum(map(state_bytes, named.values())) == state_bytes(state)
    assert all(map(torch.equal, flatten(back).values(), named.values()))
