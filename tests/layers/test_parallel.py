"""Mixers side by side: what they add up to, what reaches each, what is refused. Steps and packing: test_mixers.py."""

import pytest
import torch
from torch import Tensor, nn

from zoo.layers import Attention, BidirectionalAttention, CrossAttention, GatedLinearAttention, Mixer, Parallel
from zoo.layers.state import state_bytes

D = 16


def pair() -> tuple[GatedLinearAttention, Attention]:
    torch.manual_seed(0)
    return GatedLinearAttention(D, n_heads=2), Attention(D, n_heads=2)


@pytest.mark.parametrize(("combine", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_outputs_are_added(combine: str, share: float) -> None:
    mixers, x = pair(), torch.randn(2, 7, D)
    y, state = Parallel(D, mixers, combine=combine)(x)  # type: ignore[arg-type]
    apart = [mixer(x) for mixer in mixers]
    torch.testing.assert_close(y, share * (apart[0][0] + apart[1][0]))
    assert len(state) == 2
    torch.testing.assert_close(state[0], apart[0][1])


def test_norms_weigh_the_mixers() -> None:
    mixers, x = pair(), torch.randn(2, 7, D)
    layer = Parallel(D, mixers, norm=True)
    assert layer.norms is not None
    with torch.no_grad():
        layer.norms[0].weight.fill_(0.0)
        layer.norms[1].weight.fill_(3.0)
    y = mixers[1](x)[0]
    torch.testing.assert_close(layer(x)[0], 3 * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_state_bytes_are_the_sum() -> None:
    layer = Parallel(D, pair())
    assert layer.state_bytes(3, 11) == sum(mixer.state_bytes(3, 11) for mixer in layer.members())
    assert state_bytes(layer(torch.randn(3, 11, D))[1]) == layer.state_bytes(3, 11)


class Plain(Mixer):
    """A mixer that knows of no documents."""

    takes = ()

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, tuple[()]]:
        return x.cumsum(1), ()

    def init_state(self, batch: int) -> tuple[()]:
        return ()


def test_each_mixer_gets_what_it_takes() -> None:
    both = Parallel(D, [Attention(D, n_heads=2), CrossAttention(D, n_heads=2)])
    assert "memory" in both.takes
    assert "cu_seqlens" in Parallel(D, pair()).takes
    assert "cu_seqlens" not in Parallel(D, [*pair(), Plain()]).takes  # Surroundings refuses documents then
    assert "visible" not in Parallel(D, pair()).takes  # GLA takes no mask


def test_one_that_sees_both_sides_makes_all_of_them_so() -> None:
    layer = Parallel(D, [BidirectionalAttention(D, n_heads=2), GatedLinearAttention(D, n_heads=2)])
    assert not layer.causal
    assert layer(torch.randn(1, 5, D))[1] is None
    assert layer.init_state(1) is None
    assert layer.state_bytes(1) == 0
    with pytest.raises(ValueError, match="sees both sides"):
        layer(torch.randn(1, 5, D), ())


@pytest.mark.parametrize("mixers", [[], [nn.Identity()]])
def test_fewer_than_two_are_refused(mixers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"at least two mixers; got {len(mixers)}"):
        Parallel(D, mixers)


def test_another_way_to_combine_is_refused() -> None:
    with pytest.raises(ValueError, match="combine must be one of sum, mean; got 'max'"):
        Parallel(D, pair(), combine="max")  # type: ignore[arg-type]
