"""Every mixer's proofs: any cut in time, steps equal one pass, packing, causality, gradients through the state."""

import itertools
from collections.abc import Callable

import pytest
import torch
from case_table import D, make_mixer, mixers, parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from zoo.layers import LSTM, SLSTM, Attention, DeltaNet, GatedDeltaNet, GatedLinearAttention, Mamba
from zoo.layers.mixer_registry import MIXERS
from zoo.layers.state import map_state, state_bytes
from zoo.ops import Visible

CAUSAL, BIDIRECTIONAL = mixers(bidirectional=False), mixers(bidirectional=True)
EVERY = parametrize("name", CAUSAL)


def test_every_mixer_has_a_case() -> None:
    ours = {name for name, maker in MIXERS.items() if maker.__module__.startswith("zoo.layers.")}
    missing = ours - set(mixers())
    assert not missing, f"tests/cases/NAME.py says what a mixer's proofs need; {', '.join(sorted(missing))} has none"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@EVERY
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_cut_in_time_changes_nothing(name: str, data: st.DataObject) -> None:
    mixer, x = make_mixer(name), random(2, 40, D)
    cut = data.draw(st.integers(0, 40))
    y, last = mixer(x)
    y1, middle = mixer(x[:, :cut])
    y2, end = mixer(x[:, cut:], middle)
    assert_close(torch.cat([y1, y2], dim=1), y)
    assert_close(end, last)


@EVERY
def test_steps_from_the_initial_state_equal_one_pass(name: str) -> None:
    mixer, x = make_mixer(name), random(2, 12, D)
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
    mixer, x, again = make_mixer(name), random(1, 30, D), random(1, 30, D).flip(1)
    cu = torch.tensor(bounds)
    _, packed_state = mixer(x, cu_seqlens=cu)
    y, _ = mixer(again, packed_state, cu_seqlens=cu)
    for left, right in itertools.pairwise(bounds):
        _, state = mixer(x[:, left:right], mixer.init_state(1))
        want, _ = mixer(again[:, left:right], state)
        assert_close(y[:, left:right], want)


@EVERY
def test_the_future_does_not_reach_the_past(name: str) -> None:
    mixer, x = make_mixer(name), random(1, 20, D)
    changed = x.clone()
    changed[:, 11:] += 1.0
    assert_close(mixer(x)[0][:, :11], mixer(changed)[0][:, :11])
    assert not torch.allclose(mixer(x)[0][:, 11:], mixer(changed)[0][:, 11:])


@EVERY
def test_gradients_cross_a_cut(name: str) -> None:
    """Cutting time must not cut the graph: the input's gradient is the same with and without a cut."""
    mixer, x = make_mixer(name), random(1, 20, D).requires_grad_()
    weight = random(1, 20, D)
    (whole,) = torch.autograd.grad((mixer(x)[0] * weight).sum(), x)
    y1, state = mixer(x[:, :9])
    y2, _ = mixer(x[:, 9:], state)
    (cut,) = torch.autograd.grad((torch.cat([y1, y2], dim=1) * weight).sum(), x)
    assert_close(cut, whole)


@EVERY
def test_every_parameter_gets_a_gradient(name: str) -> None:
    mixer = make_mixer(name)
    mixer(random(2, 20, D))[0].square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@parametrize("name", CAUSAL, only=lambda name: name != "short_convolution")
def test_state_bytes_count_the_state(name: str) -> None:
    mixer = make_mixer(name)
    _, state = mixer(random(3, 17, D))
    assert mixer.state_bytes(3, 17) == state_bytes(state)
    assert mixer.state_bytes(3, 0) == state_bytes(mixer.init_state(3))


@EVERY
def test_bfloat16_autocast_runs_forward_and_backward(name: str) -> None:
    mixer, x = make_mixer(name).float(), random(2, 20, D).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x)
    y.float().square().sum().backward()
    assert_close(y.float(), mixer(x)[0], rtol=0.1, atol=0.1)  # bfloat16 has 8 bits: a sanity check, not a proof
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)


def test_states_keep_their_nesting() -> None:
    mixer = make_mixer("deltanet")
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
        (
            lambda: DeltaNet(D, use_gate=True, use_output_norm=False),
            "needs use_output_norm; got use_output_norm=False",
        ),
        (lambda: DeltaNet(D, use_beta=False, allow_neg_eigval=True), "write strength, and use_beta=False has none"),
        (lambda: Mamba(D, selective=False, dt_rank=3), "selective=False has none; got 3, leave it out"),
        (lambda: GatedDeltaNet(D, n_heads=4, n_v_heads=6), "multiple of n_heads = 4; got 6"),
        (lambda: GatedLinearAttention(D, n_heads=3), "n_heads must divide"),
        (lambda: LSTM(D, n_heads=3), "LSTM: n_heads must divide d_model = 16; got 3"),
        (lambda: SLSTM(D, n_heads=3), "SLSTM: n_heads must divide d_model = 16; got 3"),
    ],
)
def test_refusals(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# -- mixers that see both sides of every token ----------------------------------------------------------------------


@parametrize("name", BIDIRECTIONAL)
def test_the_future_reaches_the_past_and_there_is_no_state(name: str) -> None:
    mixer, x = make_mixer(name), random(1, 20, D)
    changed = x.clone()
    changed[:, 11:] += 1.0
    assert not torch.allclose(mixer(x)[0][:, :11], mixer(changed)[0][:, :11])
    assert mixer(x)[1] is None
    assert not mixer.causal


@parametrize("name", BIDIRECTIONAL)
def test_packed_documents_see_nothing_of_each_other(name: str) -> None:
    mixer, x, bounds = make_mixer(name), random(1, 30, D), [0, 11, 11, 12, 30]
    y, _ = mixer(x, cu_seqlens=torch.tensor(bounds))
    for left, right in itertools.pairwise(bounds):
        assert_close(y[:, left:right], mixer(x[:, left:right])[0])


@parametrize("name", BIDIRECTIONAL)
def test_every_parameter_of_a_bidirectional_mixer_gets_a_gradient(name: str) -> None:
    mixer = make_mixer(name)
    mixer(random(2, 20, D))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


def test_a_window_of_one_sees_the_own_position_alone() -> None:
    torch.manual_seed(0)
    layer = Attention(8, n_heads=2, window=1)
    x = torch.randn(1, 5, 8)
    y, _ = layer(x)
    assert torch.allclose(y, layer.o_proj(layer.v_proj(x)), atol=1e-6)


def test_attention_runs_two_streams_of_block_diffusion() -> None:
    """A clean stream beside a noisy one is what it is alone; a noisy block sees the clean ones before it."""
    torch.manual_seed(0)
    layer, T, block = Attention(16, n_heads=2), 12, 4
    noisy, clean = torch.randn(2, 1, T, 16)
    positions = torch.arange(T).repeat(2)[None]
    both, _ = layer(torch.cat([noisy, clean], 1), positions=positions, visible=Visible.block_diffusion(T, block))
    at = torch.arange(T) // block
    alone = Visible(at[None], at[None], torch.full((1, T), T))  # causal by blocks
    torch.testing.assert_close(both[:, T:], layer(clean, visible=alone)[0])
    for b in range(T // block):  # one block after the other, behind the clean tokens before it
        stretch = slice(b * block, (b + 1) * block)
        x = torch.cat([clean[:, : b * block], noisy[:, stretch]], 1)
        label = torch.cat([at[: b * block], at[stretch]])[None]
        seen = layer(x, visible=Visible(label, label, torch.full_like(label, T)))[0][:, b * block :]
        torch.testing.assert_close(both[:, stretch], seen)
    with pytest.raises(ValueError, match="visible says all that is seen; leave out a window"):
        Attention(16, window=3)(clean, visible=alone)
