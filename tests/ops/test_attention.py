"""Attention against its definition and against others' code: masks, windows, grouped heads, caches, packing, merging.

Parity of every form with the reference, gradients and packing are the shared harness's (test_operators.py).
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zoo.ops import attention
from zoo.ops.attention.attention import blockwise, sdpa
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import LogSumExp, fold
from zoo.ops.core.spec import TOLERANCE, relative_error

if dispatch.HAS_TRITON:
    from zoo.ops.attention.attention import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.kernels
FORMS = ["torch", pytest.param("triton", marks=needs_triton)]


def inputs(
    B: int, T: int, S: int, H: int = 4, Hk: int = 2, K: int = 8, V: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, K), (B, S, Hk, K), (B, S, Hk, V))
    made = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return tuple(x.to(dtype).requires_grad_() for x in made)


def for_form(form: str, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """As the form takes them: kernels in float32 on the device."""
    if form != "triton":
        return args
    return tuple(x.detach().to(DEVICE, torch.float32).requires_grad_() for x in args)


def gradients(run: Callable[..., tuple[torch.Tensor, ...]], args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients for fixed cotangents, in float64 on the CPU."""
    outputs = run(*args)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y) for y in outputs]
    found = (*outputs, *torch.autograd.grad(outputs, args, upstream))
    return tuple(x.detach().double().cpu() for x in found)


def assert_same(form: str, ours: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, want, strict=True):
        assert_close(a, b, rtol=2e-5, atol=2e-5) if form == "triton" else assert_close(a, b)


def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query at a time, in the words of the docstring."""
    B, T, H, K = q.shape
    S, groups = k.shape[1], H // k.shape[2]
    o = q.new_zeros(B, T, H, v.shape[-1])
    for t in range(T):
        here = S - T + t
        first = 0 if window is None else max(0, here - window + 1)
        for h in range(H):
            scores = (q[:, t, h, None] * k[:, first : here + 1, h // groups]).sum(-1) * K**-0.5
            o[:, t, h] = (scores.softmax(-1).unsqueeze(-1) * v[:, first : here + 1, h // groups]).sum(1)
    return o


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (7, 7), (5, 12)])
def test_every_form_equals_a_loop(T: int, S: int, window: int | None) -> None:
    q, k, v = inputs(2, T, S)
    want = loop(q, k, v, window)
    assert_close(attention(q, k, v, window=window), want)
    assert_close(attention(q, k, v, window=window, return_lse=True)[0], want)
    assert_close(attention(q, k, v, window=window, backend="reference"), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("T", "S"), [(600, 600), (513, 700)])
@pytest.mark.parametrize("form", ["sdpa", "blocks"])
def test_values_and_gradients_equal_the_reference(form: str, T: int, S: int, window: int | None, causal: bool) -> None:
    args, lengths = inputs(1, T, S), torch.tensor([S - 3])

    def run(backend: str, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if backend == "torch" and form == "sdpa":
            return (sdpa.attention_sdpa(*args, causal, window, 8**-0.5, lengths),)
        o, lse = attention(*args, causal=causal, window=window, key_lengths=lengths, return_lse=True, backend=backend)
        return (o,) if form == "sdpa" else (o, lse.masked_fill(lse == -math.inf, 0.0))

    assert_same(form, gradients(lambda *a: run("torch", *a), args), gradients(lambda *a: run("reference", *a), args))


@pytest.mark.parametrize("kwargs", [{}, {"window": 3}, {"causal": False}], ids=str)
@pytest.mark.parametrize("return_lse", [True, False])
def test_gradcheck(kwargs: dict[str, int], return_lse: bool) -> None:
    args = inputs(1, 4, 6)
    assert torch.autograd.gradcheck(lambda *a: attention(*a, return_lse=return_lse, **kwargs), args, fast_mode=True)


def test_blocks_of_keys_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """The online softmax over more than one block of keys, some of which a row does not see at all."""
    monkeypatch.setattr(blockwise, "BLOCK_KEYS", 5)
    monkeypatch.setattr(blockwise, "BLOCK_QUERIES", 7)
    args = inputs(2, 20, 33)
    for kwargs in ({}, {"window": 6}, {"causal": False}, {"key_lengths": torch.tensor([0, 18])}):

        def run(backend: str, *a: torch.Tensor, kwargs: dict[str, Any] = kwargs) -> tuple[torch.Tensor, ...]:
            o, lse = attention(*a, return_lse=True, backend=backend, **kwargs)
            return o, lse.masked_fill(lse == -math.inf, 0.0)

        want = gradients(lambda *a: run("reference", *a), args)
        assert_same("torch", gradients(lambda *a: run("torch", *a), args), want)


# Oracles that are not ours


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_torchs_attention(form: str, causal: bool) -> None:
    args = inputs(2, 40, 40, K=16, V=16)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return (o.transpose(1, 2),)

    def ours(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (attention(*a, causal=causal, return_lse=True, backend=form)[0],)

    assert_same(form, gradients(ours, for_form(form, args)), gradients(theirs, args))


@pytest.mark.parametrize("window", [1, 17, 39, 40])
@pytest.mark.parametrize("form", FORMS)
def test_its_window_is_that_of_flash_linear_attention(form: str, window: int) -> None:
    naive = pytest.importorskip("fla.ops.attn.naive", reason="needs flash-linear-attention; install the extra parity")
    args = inputs(1, 40, 40, K=16, V=16)
    want = gradients(lambda *a: (naive.naive_parallel_attn(*a, window_size=window)[0],), args)
    ours = gradients(lambda *a: (attention(*a, window=window, backend=form),), for_form(form, args))
    assert_same(form, ours, want)


def test_its_sum_is_torchs() -> None:
    q, k, v = inputs(2, 30, 30, Hk=4, K=16, V=16, dtype=torch.float32)
    heads = (x.detach().transpose(1, 2) for x in (q, k, v))
    want = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, is_causal=True)[1]  # (B, H, T)
    assert_close(attention(q, k, v, return_lse=True)[1], want.transpose(1, 2), rtol=2e-6, atol=2e-6)


# Edges


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_a_window_of_one_returns_the_value(form: str) -> None:
    q, k, v = for_form(form, inputs(2, 9, 9))
    o, lse = attention(q, k, v, window=1, return_lse=True, backend=form)
    assert_close(o, v.repeat_interleave(2, dim=2))
    score = (q * k.repeat_interleave(2, dim=2)).sum(-1) * 8**-0.5
    assert_close(lse, score)
    for gradient in torch.autograd.grad(o.sum(), (q, k)):
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15 if form != "triton" else 1e-6)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_a_window_over_everything_is_no_window(form: str) -> None:
    args = for_form(form, inputs(1, 20, 33))
    for causal in (True, False):
        want = attention(*args, causal=causal, backend=form)
        for window in (33, 1000):
            assert_close(attention(*args, causal=causal, window=window, backend=form), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [3, 5, 6, 8, 9])
def test_windows_when_queries_outnumber_keys(form: str, window: int) -> None:
    args = inputs(1, 9, 5)
    want = attention(*args, causal=False, window=window, backend="reference")
    ours = attention(*for_form(form, args), causal=False, window=window, backend=form)
    assert_close(ours.double().cpu(), want, rtol=2e-5, atol=2e-5 if form == "triton" else 1e-14)


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.5])
def test_any_scale(form: str, scale: float) -> None:
    args = inputs(1, 20, 20)
    want = gradients(lambda *a: attention(*(a[0] * scale, *a[1:]), scale=1.0, return_lse=True), args)
    ours = gradients(lambda *a: attention(*a, scale=scale, return_lse=True, backend=form), for_form(form, args))
    assert_same(form, ours, want)


@pytest.mark.parametrize("masks", [{}, {"causal": False}, {"window": 5}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_negative_scale_turns_the_order_of_the_keys(form: str, masks: dict[str, Any]) -> None:
    args = inputs(1, 20, 20, V=8)  # as large as keys, where torch has a fused kernel
    want = gradients(lambda q, k, v: (attention(-0.5 * q, k, v, scale=1.0, **masks),), args)
    ours = gradients(lambda *a: (attention(*a, scale=-0.5, backend=form, **masks),), for_form(form, args))
    assert_same(form, ours, want)


@pytest.mark.parametrize("form", FORMS)
def test_equal_keys_give_the_mean(form: str) -> None:
    q, k, v = for_form(form, inputs(1, 70, 70, Hk=4))
    k = k.detach()[:, :1].expand_as(k).contiguous().requires_grad_()
    o, lse = attention(q, k, v, return_lse=True, backend=form)
    count = torch.arange(1, 71, dtype=o.dtype, device=o.device)[None, :, None]
    assert_close(o, v.cumsum(1) / count.unsqueeze(-1), rtol=1e-5, atol=1e-5)
    assert_close(lse, (q * k).sum(-1) * 8**-0.5 + count.log(), rtol=1e-5, atol=1e-5)
    (dq,) = torch.autograd.grad(o.square().sum(), q)
    assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_a_query_without_keys_gives_zeros(form: str) -> None:
    args = for_form(form, inputs(2, 3, 4))
    lengths = torch.tensor([0, 2], device=args[0].device)  # no query of the first row sees a key; one of the second
    o, lse = attention(*args, key_lengths=lengths, return_lse=True, backend=form)
    blind = torch.tensor([[True, True, True], [True, False, False]], device=args[0].device)
    assert (o[blind] == 0).all()
    assert (lse[blind] == -math.inf).all()
    assert torch.isfinite(lse[~blind]).all()
    for upstream in (1.0, math.nan):  # what flows into the sum of a blind query goes nowhere
        dlse = torch.ones_like(lse).masked_fill(blind.unsqueeze(-1), upstream)
        found = torch.autograd.grad((o, lse), args, (torch.ones_like(o), dlse), retain_graph=True)
        if form != "reference" or upstream == upstream:
            assert all(torch.isfinite(x).all() for x in found)
            assert all((x[0] == 0).all() for x in found)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_nothing_to_see_and_nobody_to_look(form: str) -> None:
    q, k, v = for_form(form, inputs(2, 3, 0))
    o = attention(q, k, v, causal=False, backend=form)
    assert o.shape == (2, 3, 4, 6)
    assert (o == 0).all()
    q, k, v = for_form(form, inputs(1, 0, 5))
    o, lse = attention(q, k, v, return_lse=True, backend=form)
    assert (o.shape, lse.shape) == ((1, 0, 4, 6), (1, 0, 4))
    assert all((x == 0).all() for x in torch.autograd.grad(o.sum() + lse.sum(), (k, v)))
    packed = attention(q, k[:, :0], v[:, :0], cu_seqlens=torch.tensor([0, 0, 0]), backend=form)
    assert packed.shape == (1, 0, 4, 6)


def test_a_long_window_never_builds_a_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 2000, 2000)
    seen: list[int] = []
    visible = sdpa.visible
    monkeypatch.setattr(sdpa, "visible", lambda T, S, *rest: (seen.append(T * S), visible(T, S, *rest))[1])
    sdpa.attention_sdpa(q, k, v, True, 100, 1.0, None)
    assert seen
    assert max(seen) <= sdpa.WINDOW_BLOCK * (sdpa.WINDOW_BLOCK + 100)


def test_square_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA builds a T x S mask only for few queries and keys; beyond, our blocks run."""
    largest: list[int] = []
    visible = sdpa.visible
    monkeypatch.setattr(sdpa, "visible", lambda T, S, *rest: (largest.append(T * S), visible(T, S, *rest))[1])
    monkeypatch.setattr(sdpa, "MASK_LIMIT", 600 * 700)
    for T, S in ((300, 700), (600, 700), (700, 700)):
        q, k, v = (x.detach() for x in inputs(1, T, S, H=1, Hk=1))
        for kwargs in ({}, {"key_lengths": torch.tensor([S - 5])}, {"causal": False, "window": 9}, {"window": 9}):
            want = attention(q, k, v, backend="reference", **kwargs)
            assert_close(attention(q, k, v, **kwargs), want)
    assert 300 * 700 in largest
    assert max(largest) < 600 * 700


# Caches and packed documents


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_different_cache_lengths(form: str) -> None:
    q, k, v = for_form(form, inputs(3, 2, 8))
    o = attention(q, k, v, key_lengths=torch.tensor([8, 5, 2], device=q.device), backend=form)
    for row, length in enumerate((8, 5, 2)):
        alone = attention(q[row : row + 1], k[row : row + 1, 8 - length :], v[row : row + 1, 8 - length :])
        assert_close(o[row : row + 1], alone)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_slots_filled_from_the_left(form: str, T: int, window: int | None) -> None:
    """Rows with different pasts; what lies behind a row's last query is large, and no output shows it."""
    q, k, v = for_form(form, inputs(3, T, 12))
    past = torch.tensor([0, 5, 12 - T], device=q.device)
    behind = (torch.arange(12, device=q.device) >= past[:, None] + T)[:, :, None, None]
    for kwargs in ({}, {"return_lse": True}):
        o = attention(
            q, k.masked_fill(behind, 1e9), v.masked_fill(behind, 1e9), past=past, window=window, backend=form, **kwargs
        )
        o = o[0] if kwargs else o
        for row, n in enumerate((past + T).tolist()):
            want = loop(q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n], window)
            assert_same(form, (o[row : row + 1],), (want,))


def test_slots_of_many_queries_go_without_a_large_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "MASK_LIMIT", 50)
    (q, k, v), past = inputs(2, 5, 16), torch.tensor([2, 11])

    def run(backend: str, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (attention(*args, past=past, window=6, backend=backend),)

    calls: list[object] = []
    monkeypatch.setattr(sdpa, "visible_slots", lambda *_: calls.append(1))
    ours = gradients(functools.partial(run, "torch"), (q, k, v))
    assert not calls
    monkeypatch.undo()
    assert_same("torch", ours, gradients(functools.partial(run, "torch"), (q, k, v)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 4])
def test_one_query_at_a_time_equals_all_at_once(form: str, window: int | None) -> None:
    q, k, v = for_form(form, inputs(1, 12, 12))
    want = attention(q, k, v, window=window, backend=form)
    for t in range(0, 12, 3):
        o = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], window=window, backend=form)
        assert_close(o, want[:, t : t + 1])


@pytest.mark.parametrize("kwargs", [{}, {"window": 3}, {"causal": False}, {"causal": False, "window": 3}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_do_not_see_each_other(form: str, kwargs: dict[str, int]) -> None:
    args = inputs(1, 80, 90)
    cuts, keys = (0, 5, 5, 80), (0, 8, 9, 90)  # an empty document with one key; one of several blocks

    def packed(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cu, cu_k = torch.tensor(cuts, device=a[0].device), torch.tensor(keys, device=a[0].device)
        return attention(*a, cu_seqlens=cu, cu_seqlens_k=cu_k, return_lse=True, backend=form, **kwargs)

    def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [
            attention(q[:, a:b], k[:, c:d], v[:, c:d], return_lse=True, backend="reference", **kwargs)
            for (a, b), (c, d) in zip(itertools.pairwise(cuts), itertools.pairwise(keys), strict=True)
            if a < b
        ]
        return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True))

    assert_same(form, gradients(packed, for_form(form, args)), gradients(alone, args))


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_documents_is_the_order_of_outputs(form: str) -> None:
    q, k, v = (x.detach() for x in for_form(form, inputs(1, 30, 30)))
    lengths, order = [4, 19, 7], [2, 0, 1]
    o = attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 23, 30]), backend=form).split(lengths, dim=1)
    moved = [torch.cat([x.split(lengths, dim=1)[i] for i in order], dim=1) for x in (q, k, v)]
    ours = attention(*moved, cu_seqlens=torch.tensor([0, 7, 11, 30]), backend=form)
    assert_close(ours, torch.cat([o[i] for i in order], dim=1))


# The log-sum-exp and what it is for


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_parts_of_the_keys_merge_to_all_of_them(data: st.DataObject) -> None:
    """Any three parts in any order; causal rows that see nothing of a part included."""
    q, k, v = inputs(2, 20, 20)
    part = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=20, max_size=20)))
    part[data.draw(st.integers(0, 19)) :] = data.draw(st.integers(0, 2))  # the other parts' last keys come early ...
    part[:5] = 0  # ... and the first queries see nothing of two parts
    order = data.draw(st.permutations(range(3)))
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        cast = [x.detach().to(dtype) for x in (q, k, v)]
        whole, lse = attention(*cast, return_lse=True)
        merged, sum_of_parts = fold(partial_sum(*cast, part == i) for i in order).output()
        assert_close(merged, whole, rtol=0, atol=atol)
        assert_close(sum_of_parts, lse, rtol=0, atol=4 * atol)  # sums up to 4 here


def partial_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor) -> LogSumExp:
    """Causal attention of every query over the chosen keys only: a call for each stretch that sees the same of them."""
    counts = chosen.cumsum(0).tolist()  # of chosen keys up to each query
    k, v = k[:, chosen], v[:, chosen]
    parts = [
        attention(q[:, t : t + 1], k[:, : counts[t]], v[:, : counts[t]], causal=False, return_lse=True)
        for t in range(q.shape[1])
    ]
    return LogSumExp.of(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True)))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_a_merge(form: str) -> None:
    """Old keys seen by all, own keys causally: what a rank does with another rank's keys. One row sees no old key."""
    args = inputs(2, 3, 6, Hk=4, K=3, V=2)

    def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lengths = torch.tensor([3, 0], device=q.device)
        old = attention(q, k[:, :3], v[:, :3], causal=False, key_lengths=lengths, return_lse=True, backend=form)
        own = attention(q, k[:, 3:], v[:, 3:], return_lse=True, backend=form)
        return LogSumExp.of(*old).then(LogSumExp.of(*own)).output()

    def whole(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attention(*a, key_lengths=torch.tensor([6, 3]), return_lse=True, backend="reference")

    assert_same(form, gradients(merged, for_form(form, args)), gradients(whole, args))
    if form == "torch":
        assert torch.autograd.gradcheck(merged, args, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sum_is_float32_at_least(dtype: torch.dtype) -> None:
    o, lse = attention(*inputs(1, 9, 9, dtype=dtype), return_lse=True)
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Kernels


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],  # the interpreter multiplies no bfloat16
)
def test_kernels_take_half_precision(dtype: torch.dtype) -> None:
    args = tuple(x.detach().to(DEVICE).requires_grad_() for x in inputs(1, 70, 70, K=20, V=40, dtype=dtype))
    ours = gradients(lambda *a: attention(*a, window=30, return_lse=True, backend="triton"), args)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in args)
    want = gradients(lambda *a: attention(*a, window=30, return_lse=True, backend="reference"), exact)
    for a, b in zip(ours, want, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((2, 9, 9), {}),
        ((1, 9, 14), {"window": 4}),
        ((1, 5, 3), {"causal": False}),
        ((1, 9, 5), {"causal": False, "window": 3}),
        ((1, 9, 9), {"window": 2, "cu_seqlens": torch.tensor([0, 3, 3, 9])}),
    ],
    ids=str,
)
def test_operations_are_those_of_the_pairs_that_see_each_other(
    shape: tuple[int, int, int], kwargs: dict[str, Any]
) -> None:
    B, _T, S = shape
    args = tuple(x.detach().float().to(DEVICE).requires_grad_() for x in inputs(*shape))
    with FlopCounterMode(display=False) as counter:
        o = attention(*args, backend="triton", **kwargs)
        forward = counter.get_total_flops()
        o.sum().backward()
    # equal scores and a value of its own for every key: what is in an output was seen
    q, k = args[0].detach(), args[1].detach() * 0
    v = torch.eye(S, device=DEVICE).expand(B, 2, S, S).transpose(1, 2)
    pairs = int((attention(q, k, v, backend="reference", **kwargs)[:, :, 0] > 0).sum())
    assert forward == 2 * pairs * 4 * (8 + 6)
    assert counter.get_total_flops() - forward == 2 * pairs * 4 * (3 * 8 + 2 * 6)


@needs_triton
def test_larger_heads_run_elsewhere_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(1, 3, 3, K=257, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"heads of at most 256 numbers; got K = 257, use backend='torch'"):
        attention(*args, backend="triton")
    monkeypatch.setattr(dispatch, "on_cuda", lambda x: True)
    dispatch.say_once.cache_clear()
    with pytest.warns(UserWarning, match="heads of at most 256 numbers"):
        o, lse = attention(*args, return_lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*args, window=2)  # once
        attention(*args)  # plain attention is SDPA's anyway
    want = attention(*args, return_lse=True, backend="reference")
    assert_close((o, lse), want)


@needs_triton
def test_auto_on_a_gpu_asks_for_kernels_where_sdpa_would_need_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    run = kernels.attention_kernels
    monkeypatch.setattr(kernels, "attention_kernels", lambda *a: (calls.append(True), run(*a))[1])
    monkeypatch.setattr(dispatch, "resolve", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "on_cuda", lambda _: True)
    q, k, v = inputs(1, 5, 5, dtype=torch.float32)
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"causal": False}, False),
        ({"window": 5}, False),  # all there is
        ({"window": 4}, True),
        ({"return_lse": True}, True),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, True),
        ({"key_lengths": torch.tensor([4])}, True),
    ]
    for kwargs, expected in cases:
        calls.clear()
        attention(q, k, v, **kwargs)
        assert bool(calls) == expected, kwargs
    calls.clear()
    attention(q[:, :1], k, v, key_lengths=torch.tensor([4]))  # one query: the mask is a row
    with pytest.warns(UserWarning, match="got float64, so the torch form runs"):
        attention(q.double(), k.double(), v.double(), window=2)
    assert not calls


# Refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, r"window must be an integer of at least 1 .* or None for all; got 0"),
        ({"window": 2.5}, r"window must be an integer of at least 1 .*; got 2.5"),
        ({"scale": math.inf}, r"scale must be a finite number or None for K\*\*-0.5; got inf"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, reference; got 'cuda'"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, "cu_seqlens_k needs cu_seqlens; got only the keys' boundaries"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "end at T = 9; got 0 and 4"),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0, 5, 9])},
            "must bound the same documents; got 1 and 2",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 9]), "cu_seqlens_k": torch.tensor([0, 4, 9])},
            "document 0 has 5 queries and 4 keys, or set causal=False",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "key_lengths": torch.tensor([9])},
            "packed documents take no key_lengths; say where keys begin by cu_seqlens_k",
        ),
        (
            {"key_lengths": torch.tensor([9, 9])},
            r"key_lengths must be int32 or int64 \(1,\), one a row, .*; got \(2,\)",
        ),
        ({"past": torch.tensor([9, 9])}, r"past must be int32 or int64 \(1,\), one a row, .*; got \(2,\)"),
        (
            {"past": torch.tensor([0]), "causal": False},
            "past counts slots before causal queries .*; got .*causal=False",
        ),
        (
            {"past": torch.tensor([0]), "key_lengths": torch.tensor([9])},
            "past counts slots .*key_lengths, leave past out",
        ),
        ({"key_lengths": torch.tensor([9.0])}, r"key_lengths must be int32 or int64 .*; got \(1,\) torch.float32"),
        ({"key_lengths": [9]}, "key_lengths must be int32 or int64 .*; got list"),
    ],
)
def test_refusals(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"attention: .*{words}"):
        attention(*inputs(1, 9, 9), **change)


def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = inputs(1, 9, 9)
    with pytest.raises(ValueError, match="multiple of key heads; got 3, 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="multiple of key heads; got 4, 0"):
        attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="T <= S; got T = 9, S = 4, or set causal=False"):
        attention(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match=r"v must be .* with S = 9 as in k"):
        attention(q, k, v[:, :4])


@needs_triton
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64, use backend='torch'"):
        attention(*inputs(1, 3, 3), backend="triton")
