"""Every mixer's proofs: any cut in time, steps equal one pass, packing, causality, gradients through the state."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from zoo.layers import (
    GRU,
    LSTM,
    S4,
    S5,
    SLSTM,
    Attention,
    DeltaNet,
    Elman,
    GatedDeltaNet,
    GatedLinearAttention,
    Mamba,
    Mamba2,
    ParaGRU,
    ParaLSTM,
    ShortConvolution,
)
from zoo.layers.state import map_state, state_bytes

D = 16
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(D, n_heads=2),
    "attention-gqa-qk_norm": lambda: Attention(D, n_heads=4, n_kv_heads=2, qk_norm=True),
    "attention-window": lambda: Attention(D, n_heads=2, window=5),
    "attention-window-1": lambda: Attention(D, n_heads=2, window=1, rope_base=None),
    "gla": lambda: GatedLinearAttention(D, n_heads=2),
    "gla-conv-gqa": lambda: GatedLinearAttention(D, n_heads=4, n_kv_heads=2, conv_size=4, gate_floor=-1.0),
    "deltanet": lambda: DeltaNet(D, n_heads=2),
    "deltanet-options": lambda: DeltaNet(
        D, n_heads=2, conv_size=None, qk_activation="elu", qk_norm="sum", use_gate=True, allow_neg_eigval=True
    ),
    "deltanet-bare": lambda: DeltaNet(D, n_heads=2, qk_activation="identity", use_beta=False, use_output_norm=False),
    "gated_deltanet": lambda: GatedDeltaNet(D, n_heads=2, head_dim=8),
    "gated_deltanet-gva": lambda: GatedDeltaNet(D, n_heads=2, n_v_heads=4, head_dim=4, use_gate=False, conv_size=None),
    "mamba": lambda: Mamba(D, d_state=4),
    "mamba-constant": lambda: Mamba(D, d_state=4, selective=False),
    "mamba2": lambda: Mamba2(D, d_state=8, head_dim=8, n_groups=2),
    "para_gru": lambda: ParaGRU(D, n_heads=2),
    "para_gru-unbounded": lambda: ParaGRU(D, n_heads=1, recurrent_clip=None),
    "para_lstm": lambda: ParaLSTM(D),
    "s4": lambda: S4(D, d_state=8, mode="dplr", n_ssm=2),
    "s4d": lambda: S4(D, d_state=8),
    "s4d-bilinear": lambda: S4(D, d_state=6, init="legs", rule="bilinear", n_ssm=1),
    "s5": lambda: S5(D, d_state=8, blocks=2),
    "s5-full_glu": lambda: S5(D, d_state=8, gate="full_glu", clip=False),
    "s5-half_glu1": lambda: S5(D, d_state=8, gate="half_glu1"),
    "lstm": lambda: LSTM(D, n_heads=2),
    "gru": lambda: GRU(D, n_heads=2),
    "elman": lambda: Elman(D, n_heads=2),
    "slstm": lambda: SLSTM(D, n_heads=2),
    "slstm-bare": lambda: SLSTM(D, n_heads=1, conv_size=None, depth=1.0),
    "short_convolution": lambda: ShortConvolution(D, 4, bias=True),
}
EVERY = pytest.mark.parametrize("name", MAKERS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@EVERY
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_cut_in_time_changes_nothing(name: str, data: st.DataObject) -> None:
    mixer, x = make(name), random(2, 40, D)
    cut = data.draw(st.integers(0, 40))
    y, last = mixer(x)
    y1, middle = mixer(x[:, :cut])
    y2, end = mixer(x[:, cut:], middle)
    assert_close(torch.cat([y1, y2], dim=1), y)
    assert_close(end, last)


@EVERY
def test_steps_from_the_initial_state_equal_one_pass(name: str) -> None:
    mixer, x = make(name), random(2, 12, D)
    state, ys = mixer.init_state(2), []
    for t in range(12):
        y, state = mixer(x[:, t : t + 1], state)
        ys.append(y)
    y, last = mixer(x)
    assert_close(torch.cat(ys, dim=1), y)
    assert_close(state, last)


@EVERY
@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_packed_equals_separate_with_states_between(name: str, cuts: list[int]) -> None:
    """Two packed calls in a row: documents of different lengths, empty ones too, each go on where they were."""
    bounds = [0, *sorted(cuts), 30]
    mixer, x, again = make(name), random(1, 30, D), random(1, 30, D).flip(1)
    cu = torch.tensor(bounds)
    _, packed_state = mixer(x, cu_seqlens=cu)
    y, _ = mixer(again, packed_state, cu_seqlens=cu)
    for left, right in itertools.pairwise(bounds):
        _, state = mixer(x[:, left:right], mixer.init_state(1))
        want, _ = mixer(again[:, left:right], state)
        assert_close(y[:, left:right], want)


@EVERY
def test_the_future_does_not_reach_the_past(name: str) -> None:
    mixer, x = make(name), random(1, 20, D)
    changed = x.clone()
    changed[:, 11:] += 1.0
    assert_close(mixer(x)[0][:, :11], mixer(changed)[0][:, :11])
    assert not torch.allclose(mixer(x)[0][:, 11:], mixer(changed)[0][:, 11:])


@EVERY
def test_gradients_cross_a_cut(name: str) -> None:
    """Cutting time must not cut the graph: the input's gradient is the same with and without a cut."""
    mixer, x = make(name), random(1, 20, D).requires_grad_()
    weight = random(1, 20, D)
    (whole,) = torch.autograd.grad((mixer(x)[0] * weight).sum(), x)
    y1, state = mixer(x[:, :9])
    y2, _ = mixer(x[:, 9:], state)
    (cut,) = torch.autograd.grad((torch.cat([y1, y2], dim=1) * weight).sum(), x)
    assert_close(cut, whole)


@EVERY
def test_every_parameter_gets_a_gradient(name: str) -> None:
    mixer = make(name)
    mixer(random(2, 20, D))[0].square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "short_convolution"])
def test_state_bytes_count_the_state(name: str) -> None:
    mixer = make(name)
    _, state = mixer(random(3, 17, D))
    assert mixer.state_bytes(3, 17) == state_bytes(state)
    assert mixer.state_bytes(3, 0) == state_bytes(mixer.init_state(3))


@EVERY
def test_bfloat16_autocast_runs_forward_and_backward(name: str) -> None:
    mixer, x = make(name).float(), random(2, 20, D).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x)
    y.float().square().sum().backward()
    assert_close(y.float(), mixer(x)[0], rtol=0.1, atol=0.1)  # bfloat16 has 8 bits: a sanity check, not a proof
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)


def test_states_keep_their_nesting() -> None:
    mixer = make("deltanet")
    state = mixer.init_state(2)
    doubled = map_state(lambda x: x.repeat(2, *[1] * (x.ndim - 1)), state)
    assert type(doubled) is type(state)
    assert doubled.memory.shape[0] == 4
    assert len(doubled.convs) == 3


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Attention(D, n_heads=4, n_kv_heads=3), "n_kv_heads must divide n_heads = 4; got 3"),
        (lambda: Attention(D, n_heads=2, head_dim=7), "even head_dim; got 7"),
        (lambda: Attention(D, window=0), "window must be at least 1"),
        (lambda: DeltaNet(D, n_heads=3), "n_heads must divide"),
        (lambda: DeltaNet(D, qk_norm="l3"), "qk_norm one of l2, sum, none"),
        (lambda: GatedDeltaNet(D, n_heads=4, n_v_heads=6), "multiple of n_heads = 4; got 6"),
        (lambda: GatedLinearAttention(D, n_heads=3), "n_heads must divide"),
        (lambda: LSTM(D, n_heads=3), "LSTM: n_heads must divide d_model = 16; got 3"),
        (lambda: SLSTM(D, n_heads=3), "SLSTM: n_heads must divide d_model = 16; got 3"),
    ],
)
def test_refusals(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
