"""Aaren's attention against softmax attention with a constant query, and the ways in which it is commonly got wrong."""

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.ops import aaren
from zoo.ops.core.algebra import LogSumExp

FORMS = pytest.mark.parametrize("backend", ["torch", "reference"])
B, T, H, K = 2, 150, 3, 8


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A query (H, K), keys and values (B, T, H, K), float64 leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, K), (B, T, H, K), (B, T, H, K))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("hk,bthk->bth", q, k) / K**0.5


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries (T, H, K) or (H, K), the same everywhere, to k and v (B, T, H, K)."""
    queries = q.expand(k.shape).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


@FORMS
def test_it_is_causal_attention_with_a_constant_query(backend: str) -> None:
    q, k, v = drawn()
    want, (ours, _) = softmax_attention(q, k, v), aaren(scores(q, k), v, backend=backend)
    assert_close(ours, want, rtol=0, atol=1e-12)
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(o, (q, k, v), upstream) for o in (ours, want))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_it_is_not_attention_with_a_query_of_every_token() -> None:
    """The negative control, and what the operator cannot do: one token whose query differs is enough."""
    q, k, v = drawn()
    others = q.detach().expand(T, H, K).clone()
    others[T // 2] = others[T // 2].flip(-1)
    want, (ours, _) = softmax_attention(others, k, v), aaren(scores(q, k), v)
    assert (ours - want)[:, T // 2].abs().max() > 0.1
    assert_close(ours[:, : T // 2], want[:, : T // 2], rtol=0, atol=1e-12)


@FORMS
def test_gradients_through_average_and_log_sum(backend: str) -> None:
    """What a state means is its average and its log-sum-exp; their gradients are those of plain torch."""
    q, k, v = drawn()
    s = scores(q, k)
    prior = LogSumExp(*(x.detach().requires_grad_() for x in aaren(s.flip(1), v.flip(1))[1]))
    log_prior, prior_average = prior.m + prior.u.log(), prior.w / prior.u.unsqueeze(-1)
    both = torch.cat([log_prior.unsqueeze(1), s], dim=1)
    values = torch.cat([prior_average.unsqueeze(1), v], dim=1)
    want = (both.softmax(1).unsqueeze(-1) * values).sum(1), both.logsumexp(1)
    last = aaren(s, v, prior, backend=backend)[1]
    ours = last.output()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in want]
    leaves = (q, k, v, *prior)
    for a, b in zip(ours, want, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (ours, want)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=0, atol=1e-11)


@FORMS
def test_a_bias_of_the_keys_has_no_gradient(backend: str) -> None:
    """q . b shifts all scores alike, and a softmax does not change with that."""
    q, k, v = drawn()
    bias = torch.zeros(H, K, dtype=torch.float64, requires_grad=True)
    o, last = aaren(scores(q, k + bias), v, backend=backend)
    average, log_sum = last.output()
    loss = (o * v.detach()).sum() + average.square().sum()
    assert torch.autograd.grad(loss, bias, retain_graph=True)[0].abs().max() < 1e-12
    assert torch.autograd.grad(log_sum.sum(), bias)[0].abs().max() > 0.1  # the sum itself does change


@FORMS
def test_the_scale_of_a_state_means_nothing(backend: str) -> None:
    q, k, v = drawn()
    s = scores(q, k)
    state = aaren(s, v)[1]
    shift = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    moved = LogSumExp(state.m + shift, state.u * (-shift).exp(), state.w * (-shift).exp())
    (o, last), (o_, last_) = aaren(s, v, state, backend=backend), aaren(s, v, moved, backend=backend)
    assert_close(o_, o, rtol=0, atol=1e-12)
    assert_close(last_.output(), last.output(), rtol=0, atol=1e-12)
    assert torch.autograd.grad(o_.square().sum() + last_.output()[1].sum(), shift)[0].abs() < 1e-10


def by_the_largest_of_all(s: Tensor, v: Tensor) -> Tensor:
    """What overflows nowhere and still is wrong: sums at one scale for the whole sequence."""
    e = (s - s.amax(1, keepdim=True)).exp().unsqueeze(-1)
    return (e * v).cumsum(1) / e.cumsum(1)


def without_new_scales(s: Tensor, v: Tensor) -> Tensor:
    """A form of public code: sums of exp(s_j - m_j), each term at the scale of its own time."""
    e = (s - s.cummax(1).values).exp().unsqueeze(-1)
    return (e * v).cumsum(1) / e.cumsum(1)


@FORMS
def test_scores_that_grow_by_8_a_token_in_float32(backend: str) -> None:
    """Outputs and gradients to rounding, where sums at one scale have no denominator."""
    length = 37
    generator = torch.Generator().manual_seed(0)
    s = 8.0 * torch.arange(length).view(1, -1, 1) + torch.randn(1, length, 1, generator=generator)
    v = torch.randn(1, length, 1, 4, generator=generator)
    upstream = torch.randn(v.shape, generator=generator)
    assert by_the_largest_of_all(s, v).isnan().any(-1).sum() > 20
    made = []
    for dtype, form in ((torch.float32, backend), (torch.float64, "reference")):
        leaves = s.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()
        o, _ = aaren(*leaves, backend=form)
        made.append((o, *torch.autograd.grad(o, leaves, upstream.to(dtype))))
    for ours, exact in zip(*made, strict=True):
        assert (ours - exact).norm() < 3e-7 * exact.norm()


def test_sums_without_new_scales_are_seen() -> None:
    """The negative control of the comparison with attention: the common mistake is far outside of its tolerance."""
    q, k, v = drawn()
    error = (without_new_scales(3 * scores(q, k), v) - softmax_attention(3 * q, k, v)).abs().max()
    assert error > 0.1


def test_second_derivatives_are_those_of_the_loop() -> None:
    """The chunked form is plain torch, so that autograd has them: over two chunks and a prefix."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for backend in ("torch", "reference"):
        generator.manual_seed(0)
        s = torch.randn(1, 70, 1, generator=generator, dtype=torch.float64).requires_grad_()
        v = torch.randn(1, 70, 1, 2, generator=generator, dtype=torch.float64).requires_grad_()
        o, _ = aaren(s, v, backend=backend)
        (ds,) = torch.autograd.grad(o.pow(3).sum(), s, create_graph=True)
        made.append(torch.autograd.grad(ds.square().sum(), (s, v)))
    for a, b in zip(*made, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.everything
def test_a_million_steps_in_constant_memory() -> None:
    """One token at a time in float32: the resident memory stays, and so does the average."""
    steps, generator = 1_000_000, torch.Generator().manual_seed(0)
    s, v = torch.randn(steps, generator=generator), 1 + torch.randn(steps, 2, generator=generator)
    weights = s.double().exp()
    exact = (weights.unsqueeze(-1) * v.double()).sum(0) / weights.sum()
    state, resident = None, []
    with torch.inference_mode():
        for t in range(steps):
            o, state = aaren(s[t].view(1, 1, 1), v[t].view(1, 1, 1, 2), state)
            if t in (steps // 100, steps - 1):
                resident.append(_resident())
    assert resident[1] - resident[0] < 2**20  # a cache of the same keys and values would be 16 MB
    assert sum(x.numel() for x in state) == 4
    assert_close(o.flatten().double(), exact, rtol=0, atol=1e-4)
    assert_close(state.output()[1].item(), math.log(weights.sum()), rtol=0, atol=1e-4)


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
