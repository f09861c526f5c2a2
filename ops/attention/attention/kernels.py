"""Triton kernels of softmax attention, forward and backward (FlashAttention-2): no T x S matrix is ever stored.

Everything is documents: document d owns the query rows q0 ... q1 - 1 of the flattened (B * T) stream and the key rows
k0 ... k1 - 1 of the flattened (B * S) stream, bounds = (q0, q1, k0, k1) per document, and its last query stands at its
last key. A batch is B documents; `key_lengths` move k0. Positions are counted from k0, in int32; rows in int64. Blocks
that no query may see are not visited, and only blocks on an edge are masked.

    s = q k^T,  m = max_j s,  l = sum_j exp(scale (s - m)),  o = P v,  L = scale m + log l
    D = rowsum(do o) - dL,  dv = P^T do,  dS = P (do v^T - D),  dq = scale dS k,  dk = scale dS^T q
The backward gets m and log2 l as they were, not L: at scores of 1e4 a rounded L would cost P three digits. A row that
sees no key keeps m = +inf, so that its P is exp(-inf) = 0 everywhere. Every sum has one owner: no atomics.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.cached import cached_tensors
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

LOG2E = 1.4426950408889634


@triton.jit
def _place(begin_ptr, end_ptr, document_ptr, bounds_ptr, i_c):
    """A block's first row (int64) and number of rows, and the bounds of its document."""
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    bounds_ptr += tl.load(document_ptr + i_c) * 4
    q0, q1, k0, k1 = tl.load(bounds_ptr), tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
    return begin, size, q0, q1, k0, k1


@triton.jit
def _keys_of(first, size, n_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr):
    """lo, a, b, hi: queries first ... first + size - 1 see only keys lo ... hi - 1, and all of them see a ... b - 1.

    a - lo and b - a are whole blocks, unless nothing comes after them.
    """
    last = first + size - 1
    lo, all_lo, hi, all_hi = n_keys * 0, n_keys * 0, n_keys, n_keys
    if CAUSAL:
        hi, all_hi = tl.minimum(hi, last + 1), tl.minimum(all_hi, first + 1)
    if WINDOWED:
        lo, all_lo = tl.maximum(first - window + 1, 0), tl.maximum(last - window + 1, 0)
        if not CAUSAL:
            hi, all_hi = tl.minimum(hi, last + window), tl.minimum(all_hi, first + window)
    hi = tl.maximum(hi, lo)
    a = tl.minimum(lo + (all_lo - lo + BLOCK - 1) // BLOCK * BLOCK, hi)
    b = a + tl.maximum(tl.minimum(all_hi, hi) - a, 0) // BLOCK * BLOCK
    return lo, a, b, hi


@triton.jit
def _queries_of(first, size, start, stop, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr):
    """The same from the other side: the queries, of start ... stop - 1, that see keys first ... first + size - 1."""
    last = first + size - 1
    lo, all_lo, hi, all_hi = start, start, stop, stop
    if CAUSAL:
        lo, all_lo = tl.maximum(lo, first), tl.maximum(all_lo, last)
    if WINDOWED:
        hi, all_hi = tl.minimum(hi, last + window), tl.minimum(all_hi, first + window)
        if not CAUSAL:
            lo, all_lo = tl.maximum(lo, first - window + 1), tl.maximum(all_lo, last - window + 1)
    hi = tl.maximum(hi, lo)
    hi = tl.where(last < 0, lo, hi)  # keys before the first that exists
    a = tl.minimum(lo + (all_lo - lo + BLOCK - 1) // BLOCK * BLOCK, hi)
    b = hi
    if WINDOWED:
        b = a + tl.maximum(tl.minimum(all_hi, hi) - a, 0) // BLOCK * BLOCK
    return lo, a, b, hi


@triton.jit
def _seen(p, c, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """May the query at position p see the key at c? Both already broadcast."""
    distance = p - c
    seen = distance == distance
    if CAUSAL:
        seen = distance >= 0
    if WINDOWED:
        seen = seen & (distance < window)
        if not CAUSAL:
            seen = seen & (distance > -window)
    return seen


@triton.jit
def _fwd_part(
    b_q, b_o, b_m, b_l, k_ptr, v_ptr, p, start, stop, n_keys, window, rate,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys start ... stop - 1; k_ptr and v_ptr point at key `start`. Returns o, m and l."""
    o_k, o_v, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    o_nk = o_n[:, None] * (HK * K) + o_k[None, :]
    o_nv = o_n[:, None] * (HK * V) + o_v[None, :]
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    for j in range(start, stop, BLOCK_N):
        if MASKED:
            m_n = (o_n + j < n_keys)[:, None]
            b_k = tl.load(k_ptr + o_nk, mask=m_n & m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_n & m_v, other=0.0)
        else:
            b_k = tl.load(k_ptr + o_nk, mask=m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_v, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if MASKED:
            c = o_n + j
            seen = _seen(p[:, None], c[None, :], window, CAUSAL, WINDOWED) & (c < n_keys)[None, :]
            b_s = tl.where(seen, b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)  # nothing seen yet: exp(-inf - 0) = 0
        b_p = tl.exp2((b_s - b_safe[:, None]) * rate)
        b_r = tl.exp2((b_m - b_safe) * rate)
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_o = b_o * b_r[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_m = b_max
        k_ptr += BLOCK_N * HK * K
        v_ptr += BLOCK_N * HK * V
    return b_o, b_m, b_l


@triton.jit(do_not_specialize=["window"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (BT, H, K), (BS, HK, K), (BS, HK, V)
    o_ptr, lse_ptr, stats_ptr,  # (BT, H, V), (BT, H), (2, H, BT): m and log2 l
    begin_ptr, end_ptr, document_ptr, bounds_ptr, n_rows, window, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the keys that it may see."""
    i_c = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # later blocks see more keys: they start first
    i_h = tl.program_id(1)
    i_hk = i_h // (H // HK)
    begin, size, _q0, q1, k0, k1 = _place(begin_ptr, end_ptr, document_ptr, bounds_ptr, i_c)
    first, n_keys = (begin - q1 + k1 - k0).to(tl.int32), (k1 - k0).to(tl.int32)
    lo, a, b, hi = _keys_of(first, size, n_keys, window, CAUSAL, WINDOWED, BLOCK_N)
    o_m, o_k, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_m = o_m < size
    p = first + o_m
    q_rows = q_ptr + (begin * H + i_h) * K + o_m[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q_rows, mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
    b_o = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    rate = scale * LOG2E
    k_ptr += i_hk * K
    v_ptr += i_hk * V
    if WINDOWED:
        b_o, b_m, b_l = _fwd_part(
            b_q, b_o, b_m, b_l, k_ptr + (k0 + lo) * (HK * K), v_ptr + (k0 + lo) * (HK * V), p, lo, a, n_keys, window,
            rate, HK, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    b_o, b_m, b_l = _fwd_part(
        b_q, b_o, b_m, b_l, k_ptr + (k0 + a) * (HK * K), v_ptr + (k0 + a) * (HK * V), p, a, b, n_keys, window,
        rate, HK, K, V, False, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    b_o, b_m, b_l = _fwd_part(
        b_q, b_o, b_m, b_l, k_ptr + (k0 + b) * (HK * K), v_ptr + (k0 + b) * (HK * V), p, b, hi, n_keys, window,
        rate, HK, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    seen = b_l > 0
    b_l = tl.where(seen, b_l, 1.0)
    o_rows = o_ptr + (begin * H + i_h) * V + o_m[:, None] * (H * V) + o_v[None, :]
    tl.store(o_rows, (b_o / b_l[:, None]).to(o_ptr.dtype.element_ty), mask=m_m[:, None] & (o_v < V)[None, :])
    b_lse = tl.where(seen, b_m * scale + tl.log(b_l), float("-inf"))
    tl.store(lse_ptr + begin * H + i_h + o_m * H, b_lse, mask=m_m)
    stats_ptr += i_h * n_rows + begin
    tl.store(stats_ptr + o_m, tl.where(seen, b_m, float("inf")), mask=m_m)
    tl.store(stats_ptr + H * n_rows + o_m, tl.log2(b_l), mask=m_m)


@triton.jit
def attention_bwd_rows_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, d_ptr, n_rows,  # (BT, H, V) twice, (BT, H) twice -> (H, BT)
    H: tl.constexpr, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """D = rowsum(do o) - dL; 0 for rows that see nothing, whatever flows into their L."""
    begin, i_h = tl.program_id(0).to(tl.int64) * BLOCK_R, tl.program_id(1)
    o_r, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    m_r = begin + o_r < n_rows
    row = begin * H + i_h
    o = o_r[:, None] * (H * V) + o_v[None, :]
    m = m_r[:, None] & (o_v < V)[None, :]
    b_o = tl.load(o_ptr + row * V + o, mask=m, other=0.0).to(tl.float32)
    b_do = tl.load(do_ptr + row * V + o, mask=m, other=0.0).to(tl.float32)
    b_lse = tl.load(lse_ptr + row + o_r * H, mask=m_r, other=0.0)
    b_dlse = tl.load(dlse_ptr + row + o_r * H, mask=m_r, other=0.0)
    b_d = tl.where(b_lse == float("-inf"), 0.0, tl.sum(b_o * b_do, 1) - b_dlse)
    tl.store(d_ptr + i_h * n_rows + begin + o_r, b_d, mask=m_r)


@triton.jit
def _bwd_keys_part(
    b_k, b_v, b_dk, b_dv, q_ptr, do_ptr, stats_ptr, d_ptr, c, start, stop, n_end, window, rate, span,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Queries at positions start ... stop - 1, the pointers at the first, log2 l `span` after m. Returns dk and dv."""
    o_k, o_v, o_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_M)
    o_mk, o_mv = o_m[:, None] * (H * K) + o_k[None, :], o_m[:, None] * (H * V) + o_v[None, :]
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    for i in range(start, stop, BLOCK_M):
        m_m = o_m + i < n_end
        b_q = tl.load(q_ptr + o_mk, mask=m_m[:, None] & m_k, other=0.0)
        b_do = tl.load(do_ptr + o_mv, mask=m_m[:, None] & m_v, other=0.0)
        b_m = tl.load(stats_ptr + o_m, mask=m_m, other=float("inf"))  # a query that is not there sees nothing
        b_l = tl.load(stats_ptr + span + o_m, mask=m_m, other=0.0)
        b_d = tl.load(d_ptr + o_m, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2((b_s - b_m[None, :]) * rate - b_l[None, :])
        if MASKED:
            b_p = tl.where(_seen((o_m + i)[None, :], c[:, None], window, CAUSAL, WINDOWED), b_p, 0.0)
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_d[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
        q_ptr += BLOCK_M * H * K
        do_ptr += BLOCK_M * H * V
        stats_ptr += BLOCK_M
        d_ptr += BLOCK_M
    return b_dk, b_dv


@triton.jit(do_not_specialize=["window"])
def attention_bwd_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, d_ptr, dk_ptr, dv_ptr,
    begin_ptr, end_ptr, document_ptr, bounds_ptr, n_rows, window, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head: the sum over its query heads and the queries that see it."""
    i_c, i_hk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, size, q0, q1, k0, k1 = _place(begin_ptr, end_ptr, document_ptr, bounds_ptr, i_c)
    first = (begin - k0).to(tl.int32)
    n_end = (k1 - k0).to(tl.int32)  # one after the last query's position
    start = n_end - (q1 - q0).to(tl.int32)
    lo, a, b, hi = _queries_of(first, size, start, n_end, window, CAUSAL, WINDOWED, BLOCK_M)
    o_n, o_k, o_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    c = first + o_n
    m_n, m_k, m_v = o_n < size, o_k < K, o_v < V
    o_nk, o_nv = o_n[:, None] * (HK * K) + o_k[None, :], o_n[:, None] * (HK * V) + o_v[None, :]
    m_nk, m_nv = m_n[:, None] & m_k[None, :], m_n[:, None] & m_v[None, :]
    row_k, row_v = (begin * HK + i_hk) * K, (begin * HK + i_hk) * V
    b_k = tl.load(k_ptr + row_k + o_nk, mask=m_nk, other=0.0)
    b_v = tl.load(v_ptr + row_v + o_nv, mask=m_nv, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    rate = scale * LOG2E
    span = H * n_rows
    base = q0 - start  # + position: the query's row
    for g in range(H // HK):
        i_h = i_hk * (H // HK) + g
        if CAUSAL or WINDOWED:
            at = base + lo
            b_dk, b_dv = _bwd_keys_part(
                b_k, b_v, b_dk, b_dv, q_ptr + (at * H + i_h) * K, do_ptr + (at * H + i_h) * V,
                stats_ptr + i_h * n_rows + at, d_ptr + i_h * n_rows + at, c, lo, a, n_end, window, rate, span,
                H, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_M, BLOCK_K, BLOCK_V,
            )  # fmt: skip
        at = base + a
        b_dk, b_dv = _bwd_keys_part(
            b_k, b_v, b_dk, b_dv, q_ptr + (at * H + i_h) * K, do_ptr + (at * H + i_h) * V,
            stats_ptr + i_h * n_rows + at, d_ptr + i_h * n_rows + at, c, a, b, n_end, window, rate, span,
            H, K, V, False, CAUSAL, WINDOWED, PRECISION, BLOCK_M, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        if WINDOWED:
            at = base + b
            b_dk, b_dv = _bwd_keys_part(
                b_k, b_v, b_dk, b_dv, q_ptr + (at * H + i_h) * K, do_ptr + (at * H + i_h) * V,
                stats_ptr + i_h * n_rows + at, d_ptr + i_h * n_rows + at, c, b, hi, n_end, window, rate, span,
                H, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_M, BLOCK_K, BLOCK_V,
            )  # fmt: skip
    exists = (c >= 0)[:, None]  # rows of keys that do not exist hold what a key of zeros would give
    tl.store(dk_ptr + row_k + o_nk, tl.where(exists, b_dk * scale, 0.0).to(dk_ptr.dtype.element_ty), mask=m_nk)
    tl.store(dv_ptr + row_v + o_nv, tl.where(exists, b_dv, 0.0).to(dv_ptr.dtype.element_ty), mask=m_nv)


@triton.jit
def _bwd_queries_part(
    b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr, v_ptr, p, start, stop, n_keys, window, rate,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys start ... stop - 1, the pointers at the first. Returns dq."""
    o_k, o_v, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    o_nk = o_n[:, None] * (HK * K) + o_k[None, :]
    o_nv = o_n[:, None] * (HK * V) + o_v[None, :]
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    for j in range(start, stop, BLOCK_N):
        if MASKED:
            m_n = (o_n + j < n_keys)[:, None]
            b_k = tl.load(k_ptr + o_nk, mask=m_n & m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_n & m_v, other=0.0)
        else:
            b_k = tl.load(k_ptr + o_nk, mask=m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_v, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2((b_s - b_m[:, None]) * rate - b_l[:, None])
        if MASKED:
            c = o_n + j
            seen = _seen(p[:, None], c[None, :], window, CAUSAL, WINDOWED) & (c < n_keys)[None, :]
            b_p = tl.where(seen, b_p, 0.0)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_d[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        k_ptr += BLOCK_N * HK * K
        v_ptr += BLOCK_N * HK * V
    return b_dq


@triton.jit(do_not_specialize=["window"])
def attention_bwd_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, d_ptr, dq_ptr,
    begin_ptr, end_ptr, document_ptr, bounds_ptr, n_rows, window, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    i_c = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_h = tl.program_id(1)
    i_hk = i_h // (H // HK)
    begin, size, _q0, q1, k0, k1 = _place(begin_ptr, end_ptr, document_ptr, bounds_ptr, i_c)
    first, n_keys = (begin - q1 + k1 - k0).to(tl.int32), (k1 - k0).to(tl.int32)
    lo, a, b, hi = _keys_of(first, size, n_keys, window, CAUSAL, WINDOWED, BLOCK_N)
    o_m, o_k, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_m = o_m < size
    p = first + o_m
    row, o_mk, m_mk = begin * H + i_h, o_m[:, None] * (H * K) + o_k[None, :], m_m[:, None] & (o_k < K)[None, :]
    b_q = tl.load(q_ptr + row * K + o_mk, mask=m_mk, other=0.0)
    m_mv = m_m[:, None] & (o_v < V)[None, :]
    b_do = tl.load(do_ptr + row * V + o_m[:, None] * (H * V) + o_v[None, :], mask=m_mv, other=0.0)
    stats_ptr += i_h * n_rows + begin
    b_m = tl.load(stats_ptr + o_m, mask=m_m, other=float("inf"))
    b_l = tl.load(stats_ptr + H * n_rows + o_m, mask=m_m, other=0.0)
    b_d = tl.load(d_ptr + i_h * n_rows + begin + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    rate = scale * LOG2E
    k_ptr += i_hk * K
    v_ptr += i_hk * V
    if WINDOWED:
        b_dq = _bwd_queries_part(
            b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr + (k0 + lo) * (HK * K), v_ptr + (k0 + lo) * (HK * V), p, lo, a,
            n_keys, window, rate, HK, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    b_dq = _bwd_queries_part(
        b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr + (k0 + a) * (HK * K), v_ptr + (k0 + a) * (HK * V), p, a, b,
        n_keys, window, rate, HK, K, V, False, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    b_dq = _bwd_queries_part(
        b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr + (k0 + b) * (HK * K), v_ptr + (k0 + b) * (HK * V), p, b, hi,
        n_keys, window, rate, HK, K, V, True, CAUSAL, WINDOWED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    tl.store(dq_ptr + row * K + o_mk, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_mk)


class _Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys; the warps and pipeline stages that work on it; bytes of spills accepted."""

    m: int
    n: int
    warps: int
    stages: int
    spills: int = 0


class Launch(NamedTuple):
    """Tiles of the three large kernels, from head sizes and dtype alone: one fixed choice, no tuning.

    Forward and dq share their queries' block, so that one table of query blocks serves both.
    """

    block_k: int
    block_v: int
    precision: str
    fwd: _Tile
    queries: _Tile
    keys: _Tile

    @classmethod
    def of(cls, K: int, V: int, dtype: torch.dtype) -> "Launch":
        """Blocks of heads, precision of products and tiles for heads of K and V in this dtype."""
        block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in (K, V))
        # half precision has one way only
        wide = dtype == torch.float32
        tiles = _TILES["float32" if wide else "half", max(block_k, block_v, 64)]
        return cls(block_k, block_v, dispatch.EXACT_PRODUCTS if wide else "tf32", *tiles)

    def constants(self, tile: _Tile, H: int, HK: int, K: int, V: int, causal: bool, window: int) -> dict[str, Any]:
        """The constexpr arguments of one of the three large kernels."""
        return {
            "H": H, "HK": HK, "K": K, "V": V, "CAUSAL": causal, "WINDOWED": window > 0, "PRECISION": self.precision,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": self.block_k, "BLOCK_V": self.block_v, "LOG2E": LOG2E,
        }  # fmt: skip


# Not timed on a device yet: the largest of the tiles tried that need no register spills on sm_80 and sm_90 (python -m
# zoo.ops.core.compile_kernels attention; four query heads a key head, causal, window). Larger ones: half, 128, keys
# 64 x 64 spill 416 bytes and fwd 128 x 64 48; float32, 64, queries 64 x 32 spill 288. Where spills are accepted, a
# program holds whole heads of q, or of k and v, as operands, float32 ones in the three parts of tf32x3, and smaller
# tiles do not end it: float32, 256 has the smallest product there is.
_TILES = {
    ("half", 64): (_Tile(128, 64, 8, 3), _Tile(128, 64, 8, 3), _Tile(32, 128, 8, 2)),
    ("half", 128): (_Tile(128, 32, 8, 3), _Tile(128, 32, 8, 2), _Tile(32, 64, 8, 2, 56)),
    ("half", 256): (_Tile(64, 32, 8, 2), _Tile(64, 32, 8, 2, 72), _Tile(16, 32, 8, 2)),
    ("float32", 64): (_Tile(64, 32, 8, 2), _Tile(64, 16, 4, 2, 32), _Tile(32, 32, 8, 2)),
    ("float32", 128): (_Tile(32, 32, 8, 2), _Tile(32, 32, 8, 2, 64), _Tile(16, 32, 8, 2, 224)),
    ("float32", 256): (
        _Tile(16, 16, 8, 1, spills=24),
        _Tile(16, 16, 8, 1, spills=128),
        _Tile(16, 16, 8, 1, spills=392),
    ),
}
_BLOCK_R = 64  # rows of the kernel that makes D; bound by memory


def attention_kernels(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None,
    cuts: tuple[int, ...] | None, keys: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, V) and L (B, T, H) float32: one launch for all documents, their borders in `cuts` and `keys`."""
    (B, T, _, K), (_, S, _, V) = q.shape, v.shape
    if scale <= 0:  # the kernels take the largest product for the largest score
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    at = Launch.of(K, V, q.dtype)
    ends, k_ends = cuts or tuple(i * T for i in range(B + 1)), keys or tuple(i * S for i in range(B + 1))
    bounds, pairs = _bounds(ends, k_ends, q.device), _pairs(ends, k_ends, causal, window)
    if key_lengths is not None:
        q0, q1, _k0, k1 = bounds.unbind(1)
        bounds = torch.stack([q0, q1, k1 - key_lengths.clamp(0, S), k1], dim=1)
    queries = chunk_table(B, T, at.fwd.m, cuts, q.device)[:3]
    columns = chunk_table(B, S, at.keys.n, keys, q.device)[:3]
    return attention_fwd(q, k, v, *queries, *columns, bounds, causal, window or 0, scale, pairs)[:2]


@cached_tensors()
def _bounds(cuts: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Tensor:
    """(n, 4) int64: first and last + 1 rows of queries and of keys."""
    return torch.tensor([(*q, *k) for q, k in _documents(cuts, keys)], dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=64)
def _pairs(cuts: tuple[int, ...], keys: tuple[int, ...], causal: bool, window: int | None) -> int:
    """How many queries and keys see each other, all documents together; keys that key_lengths take away included."""
    total = 0
    for (q0, q1), (k0, k1) in _documents(cuts, keys):
        T, S = q1 - q0, k1 - k0

        def up_to(reach: int, T: int = T, S: int = S) -> int:
            """The sum over queries of the keys before position + reach."""
            return _sum_of_clipped(S - 1 + reach, S) - _sum_of_clipped(S - T - 1 + reach, S)

        total += up_to(1) if causal else T * S if window is None else up_to(window)
        total -= 0 if window is None else up_to(1 - window)
    return total


def _sum_of_clipped(n: int, top: int) -> int:
    """The sum of min(max(x, 0), top) over integers x <= n."""
    below = min(max(n, 0), top)
    return below * (below + 1) // 2 + max(n - top, 0) * top


def _documents(cuts: tuple[int, ...], keys: tuple[int, ...]) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    return zip(itertools.pairwise(cuts), itertools.pairwise(keys), strict=True)


@torch.library.custom_op("zoo::attention_fwd", mutates_args=())
@dispatch.on_its_device
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor,
    q_begin: Tensor, q_end: Tensor, q_document: Tensor, k_begin: Tensor, k_end: Tensor, k_document: Tensor,
    bounds: Tensor, causal: bool, window: int, scale: float, pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, K), k (B, S, HK, K), v (B, S, HK, V) -> o (B, T, H, V), L (B, T, H) float32, (m, log2 l) (2, H, B T).

    q_ and k_: ChunkTables of Launch.fwd.m queries and Launch.keys.n keys; bounds (n, 4) int64 as above. window: 0 for
    none. scale > 0. pairs: how many (query, key) pairs see each other, for counting operations only.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (B, T, H, K), (HK, V) = q.shape, v.shape[2:]
    at = Launch.of(K, V, q.dtype)
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    stats = q.new_empty(2, H, B * T, dtype=torch.float32)
    if len(q_begin):
        constants = at.constants(at.fwd, H, HK, K, V, causal, window)
        attention_fwd_kernel[len(q_begin), H](
            q, k, v, o, lse, stats, q_begin, q_end, q_document, bounds, B * T, window, scale,
            **constants, num_warps=at.fwd.warps, num_stages=at.fwd.stages,
        )  # fmt: skip
    return o, lse, stats


@attention_fwd.register_fake
def _(q, k, v, q_begin, q_end, q_document, k_begin, k_end, k_document, bounds, causal, window, scale, pairs):
    B, T, H, _ = q.shape
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    return q.new_empty(B, T, H, v.shape[3]), lse, lse.new_empty(2, H, B * T)


@torch.library.custom_op("zoo::attention_bwd", mutates_args=())
@dispatch.on_its_device
def attention_bwd(
    do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, stats: Tensor, q: Tensor, k: Tensor, v: Tensor,
    q_begin: Tensor, q_end: Tensor, q_document: Tensor, k_begin: Tensor, k_end: Tensor, k_document: Tensor,
    bounds: Tensor, causal: bool, window: int, scale: float, pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    do, dlse, q, k, v = (x.contiguous() for x in (do, dlse, q, k, v))
    (B, T, H, K), (HK, V) = q.shape, v.shape[2:]
    at = Launch.of(K, V, q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d = torch.empty_like(stats[0])
    if len(q_begin):
        attention_bwd_rows_kernel[triton.cdiv(B * T, _BLOCK_R), H](
            o, do, lse, dlse, d, B * T, H=H, V=V, BLOCK_R=_BLOCK_R, BLOCK_V=at.block_v
        )
        constants = at.constants(at.queries, H, HK, K, V, causal, window)
        attention_bwd_queries_kernel[len(q_begin), H](
            q, k, v, do, stats, d, dq, q_begin, q_end, q_document, bounds, B * T, window, scale,
            **constants, num_warps=at.queries.warps, num_stages=at.queries.stages,
        )  # fmt: skip
    if len(k_begin):
        constants = at.constants(at.keys, H, HK, K, V, causal, window)
        attention_bwd_keys_kernel[len(k_begin), HK](
            q, k, v, do, stats, d, dk, dv, k_begin, k_end, k_document, bounds, B * T, window, scale,
            **constants, num_warps=at.keys.warps, num_stages=at.keys.stages,
        )  # fmt: skip
    return dq, dk, dv


@attention_bwd.register_fake
def _(do, dlse, o, lse, stats, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale, ctx.pairs = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, *tensors)


@first_order("attention")
def _backward(ctx, do, dlse, _dstats):
    gradients = attention_bwd(do, dlse, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale, ctx.pairs)
    return *gradients, *(None,) * 11


attention_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.attention_fwd)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products over the visible pairs."""
    return 2 * args[-1] * q_shape[2] * (q_shape[3] + v_shape[3])


@register_flop_formula(torch.ops.zoo.attention_bwd)
def _flops_bwd(
    do_shape, dlse_shape, o_shape, lse_shape, stats_shape, q_shape, k_shape, v_shape, *args, **kwargs
) -> int:
    """Five products, 2.5 times the forward; that both kernels make the scores and dP again is not counted."""
    return 2 * args[-1] * q_shape[2] * (3 * q_shape[3] + 2 * v_shape[3])


def compile_cases() -> list[KernelCase]:
    """Heads of the published models (64; 128 with four query heads a key head; windows of 64), and 16 to 256."""
    cases = []
    for K, V, G, causal, window, dtypes in (
        (64, 64, 1, True, 0, "both"),
        (64, 64, 1, True, 2048, "both"),
        (128, 128, 4, True, 0, "both"),
        (128, 128, 4, True, 2048, "both"),
        (256, 256, 4, True, 2048, "both"),
        (16, 16, 1, True, 0, "both"),
        (64, 64, 1, False, 0, "bf16"),
        (100, 256, 1, True, 2048, "bf16"),
        (256, 32, 1, True, 2048, "bf16"),
    ):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if dtypes in ("both", name):
                cases += _cases(K, V, G, causal, window, name, dtype)
    return cases


def _cases(K: int, V: int, G: int, causal: bool, window: int, name: str, dtype: torch.dtype) -> list[KernelCase]:
    at = Launch.of(K, V, dtype)
    types = {f"{x}_ptr": f"*{name}" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")}
    types |= {f"{x}_ptr": "*fp32" for x in ("lse", "dlse", "stats", "d")}
    types |= {f"{x}_ptr": "*i64" for x in ("begin", "end", "document", "bounds")}
    types |= {"n_rows": "i32", "window": "i32", "scale": "fp32"}
    label = f"{name} K={K} V={V}" + (" causal" if causal else "") + (" window" if window else "")
    cases = []
    for kernel, tile in (
        (attention_fwd_kernel, at.fwd),
        (attention_bwd_queries_kernel, at.queries),
        (attention_bwd_keys_kernel, at.keys),
    ):
        constants = at.constants(tile, 4 * G, 4, K, V, causal, window)
        signature = {x: t for x, t in types.items() if x in kernel.arg_names}
        cases.append(KernelCase(kernel, signature, constants, tile.warps, tile.stages, tile.spills, label))
    constants = {"H": 4 * G, "V": V, "BLOCK_R": _BLOCK_R, "BLOCK_V": at.block_v}
    signature = {x: t for x, t in types.items() if x in attention_bwd_rows_kernel.arg_names}
    return [*cases, KernelCase(attention_bwd_rows_kernel, signature, constants, label=label)]
