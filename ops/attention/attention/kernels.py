"""Triton kernels of softmax attention, forward and backward (FlashAttention-2): no T x S matrix is ever stored.

What is seen comes as a `Visible`: a label for every query, and for every key the intervals of labels that see it. Named
masks (causal, windows, documents, lengths) are made into one. `tiles.py` says for each block which runs of blocks on
the other side hold a visible pair, and in which of them no pair is hidden: the others are not visited, and only runs
with hidden pairs read labels. Rows of the flattened (B * T) and (B * S) streams are int64.

    s = q k^T,  m = max_j s,  l = sum_j exp(scale (s - m)),  o = P v,  L = scale m + log l
    D = rowsum(do o) - dL,  dv = P^T do,  dS = P (do v^T - D),  dq = scale dS k,  dk = scale dS^T q
The backward gets m and log2 l as they were, not L: at scores of 1e4 a rounded L would cost P three digits. A row that
sees no key keeps m = +inf, so that its P is exp(-inf) = 0 everywhere. Every sum has one owner: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.attention.attention.launch import BLOCK_R, Launch
from zoo.ops.attention.attention.named import Mask
from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase


@triton.jit
def _block(offsets_ptr, i_c, n_blocks, PER_ROW: tl.constexpr):
    """Row and index of a block, and where its runs begin: those with hidden pairs, those without, the end."""
    row, i = i_c // n_blocks, i_c % n_blocks
    line = 2 * (i_c if PER_ROW else i)
    return row, i, tl.load(offsets_ptr + line), tl.load(offsets_ptr + line + 1), tl.load(offsets_ptr + line + 2)


@triton.jit
def _seen(label, first, end, first2, end2, TWO: tl.constexpr):
    """May the query see the key? All already broadcast."""
    seen = (first <= label) & (label < end)
    if TWO:
        seen = seen | ((first2 <= label) & (label < end2))
    return seen


@triton.jit
def _intervals(mask_ptr, S, c, m, TWO: tl.constexpr):
    """The intervals of keys c, empty where m is False, and whether anybody may see the key at all."""
    first, end = tl.load(mask_ptr + c, mask=m, other=0), tl.load(mask_ptr + S + c, mask=m, other=0)
    first2, end2, there = first, end, first < end
    if TWO:
        mask_ptr += 2 * S.to(tl.int64)
        first2, end2 = tl.load(mask_ptr + c, mask=m, other=0), tl.load(mask_ptr + S + c, mask=m, other=0)
        there = there | (first2 < end2)
    return first, end, first2, end2, there


@triton.jit
def _fwd_part(
    b_q, b_o, b_m, b_l, k_ptr, v_ptr, label, mask_ptr, S, start, stop, rate,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys start ... stop - 1 of the row that the pointers begin. Returns o, m and l."""
    o_k, o_v, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    o_nk, o_nv = o_n[:, None] * (HK * K) + o_k[None, :], o_n[:, None] * (HK * V) + o_v[None, :]
    k_ptr += start.to(tl.int64) * (HK * K)
    v_ptr += start.to(tl.int64) * (HK * V)
    for j in range(start, stop, BLOCK_N):
        if MASKED:
            c = j + o_n
            first, end, first2, end2, there = _intervals(
                mask_ptr, S, c, c < stop, TWO
            )  # fmt: skip
            m_n = (there & (c < stop))[:, None]  # keys that nobody sees may hold anything
            b_k = tl.load(k_ptr + o_nk, mask=m_n & m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_n & m_v, other=0.0)
        else:
            b_k = tl.load(k_ptr + o_nk, mask=m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_v, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if MASKED:
            seen = _seen(label[:, None], first[None, :], end[None, :], first2[None, :], end2[None, :], TWO)
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


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, T, H, K), (B, S, HK, K), (B, S, HK, V)
    o_ptr, lse_ptr, stats_ptr,  # (B, T, H, V), (B, T, H), (2, H, B T): m and log2 l
    label_ptr, mask_ptr, offsets_ptr, spans_ptr,
    T, S, n_blocks, n_rows, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PER_ROW: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the keys that it may see."""
    i_c = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # later blocks see more keys: they start first
    i_h = tl.program_id(1)
    i_hk = i_h // (H // HK)
    row, i, masked, full, over = _block(offsets_ptr, i_c, n_blocks, PER_ROW)
    o_m, o_k, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_m = o_m < T - i * BLOCK_M
    begin = row * T + i * BLOCK_M
    q_rows = q_ptr + (begin * H + i_h) * K + o_m[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q_rows, mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
    if PER_ROW:
        label_ptr += row * T
        mask_ptr += row * S * (4 if TWO else 2)
    label = tl.load(label_ptr + i * BLOCK_M + o_m, mask=m_m, other=0)
    b_o = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    rate = scale * LOG2E
    k_ptr += (row * S * HK + i_hk) * K
    v_ptr += (row * S * HK + i_hk) * V
    for r in range(masked, full):
        b_o, b_m, b_l = _fwd_part(
            b_q, b_o, b_m, b_l, k_ptr, v_ptr, label, mask_ptr, S,
            tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate,
            HK, K, V, True, TWO, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    for r in range(full, over):
        b_o, b_m, b_l = _fwd_part(
            b_q, b_o, b_m, b_l, k_ptr, v_ptr, label, mask_ptr, S,
            tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate,
            HK, K, V, False, TWO, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
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
    b_k, b_v, b_dk, b_dv, q_ptr, do_ptr, stats_ptr, d_ptr, label_ptr, first, end, first2, end2, start, stop, rate, span,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Queries start ... stop - 1 of the row that the pointers begin, log2 l `span` after m. Returns dk and dv."""
    o_k, o_v, o_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_M)
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    o_mk, o_mv = o_m[:, None] * (H * K) + o_k[None, :], o_m[:, None] * (H * V) + o_v[None, :]
    q_ptr += start.to(tl.int64) * (H * K)
    do_ptr += start.to(tl.int64) * (H * V)
    for i in range(start, stop, BLOCK_M):
        at = i + o_m
        m_m = at < stop
        b_q = tl.load(q_ptr + o_mk, mask=m_m[:, None] & m_k, other=0.0)
        b_do = tl.load(do_ptr + o_mv, mask=m_m[:, None] & m_v, other=0.0)
        b_m = tl.load(stats_ptr + at, mask=m_m, other=float("inf"))  # a query that is not there sees nothing
        b_l = tl.load(stats_ptr + span + at, mask=m_m, other=0.0)
        b_d = tl.load(d_ptr + at, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2((b_s - b_m[None, :]) * rate - b_l[None, :])
        if MASKED:
            label = tl.load(label_ptr + at, mask=m_m, other=0)
            seen = _seen(label[None, :], first[:, None], end[:, None], first2[:, None], end2[:, None], TWO)
            b_p = tl.where(seen, b_p, 0.0)
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_d[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
        q_ptr += BLOCK_M * H * K
        do_ptr += BLOCK_M * H * V
    return b_dk, b_dv


@triton.jit
def attention_bwd_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, d_ptr, dk_ptr, dv_ptr,
    label_ptr, mask_ptr, offsets_ptr, spans_ptr,
    T, S, n_blocks, n_rows, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PER_ROW: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head: the sum over its query heads and the queries that see it."""
    i_c, i_hk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, i, masked, full, over = _block(offsets_ptr, i_c, n_blocks, PER_ROW)
    o_n, o_k, o_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_n, m_k, m_v = o_n < S - i * BLOCK_N, o_k < K, o_v < V
    if PER_ROW:
        label_ptr += row * T
        mask_ptr += row * S * (4 if TWO else 2)
    first, end, first2, end2, there = _intervals(
        mask_ptr, S, i * BLOCK_N + o_n, m_n, TWO
    )  # fmt: skip
    o_nk, o_nv = o_n[:, None] * (HK * K) + o_k[None, :], o_n[:, None] * (HK * V) + o_v[None, :]
    m_nk, m_nv = m_n[:, None] & m_k[None, :], m_n[:, None] & m_v[None, :]
    begin = row * S + i * BLOCK_N
    row_k, row_v = (begin * HK + i_hk) * K, (begin * HK + i_hk) * V
    b_k = tl.load(k_ptr + row_k + o_nk, mask=m_nk & there[:, None], other=0.0)
    b_v = tl.load(v_ptr + row_v + o_nv, mask=m_nv & there[:, None], other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    rate = scale * LOG2E
    span = H * n_rows
    for g in range(H // HK):
        i_h = i_hk * (H // HK) + g
        q_row, do_row = q_ptr + (row * T * H + i_h) * K, do_ptr + (row * T * H + i_h) * V
        at = i_h * n_rows + row * T
        for r in range(masked, full):
            b_dk, b_dv = _bwd_keys_part(
                b_k, b_v, b_dk, b_dv, q_row, do_row, stats_ptr + at, d_ptr + at, label_ptr, first, end, first2, end2,
                tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate, span,
                H, K, V, True, TWO, PRECISION, BLOCK_M, BLOCK_K, BLOCK_V,
            )  # fmt: skip
        for r in range(full, over):
            b_dk, b_dv = _bwd_keys_part(
                b_k, b_v, b_dk, b_dv, q_row, do_row, stats_ptr + at, d_ptr + at, label_ptr, first, end, first2, end2,
                tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate, span,
                H, K, V, False, TWO, PRECISION, BLOCK_M, BLOCK_K, BLOCK_V,
            )  # fmt: skip
    tl.store(dk_ptr + row_k + o_nk, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_nk)
    tl.store(dv_ptr + row_v + o_nv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_nv)


@triton.jit
def _bwd_queries_part(
    b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr, v_ptr, label, mask_ptr, S, start, stop, rate,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys start ... stop - 1 of the row that the pointers begin. Returns dq."""
    o_k, o_v, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    m_k, m_v = (o_k < K)[None, :], (o_v < V)[None, :]
    o_nk, o_nv = o_n[:, None] * (HK * K) + o_k[None, :], o_n[:, None] * (HK * V) + o_v[None, :]
    k_ptr += start.to(tl.int64) * (HK * K)
    v_ptr += start.to(tl.int64) * (HK * V)
    for j in range(start, stop, BLOCK_N):
        if MASKED:
            c = j + o_n
            first, end, first2, end2, there = _intervals(
                mask_ptr, S, c, c < stop, TWO
            )  # fmt: skip
            m_n = (there & (c < stop))[:, None]
            b_k = tl.load(k_ptr + o_nk, mask=m_n & m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_n & m_v, other=0.0)
        else:
            b_k = tl.load(k_ptr + o_nk, mask=m_k, other=0.0)
            b_v = tl.load(v_ptr + o_nv, mask=m_v, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2((b_s - b_m[:, None]) * rate - b_l[:, None])
        if MASKED:
            seen = _seen(label[:, None], first[None, :], end[None, :], first2[None, :], end2[None, :], TWO)
            b_p = tl.where(seen, b_p, 0.0)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_d[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        k_ptr += BLOCK_N * HK * K
        v_ptr += BLOCK_N * HK * V
    return b_dq


@triton.jit
def attention_bwd_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, d_ptr, dq_ptr,
    label_ptr, mask_ptr, offsets_ptr, spans_ptr,
    T, S, n_blocks, n_rows, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PER_ROW: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    i_c = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_h = tl.program_id(1)
    i_hk = i_h // (H // HK)
    row, i, masked, full, over = _block(offsets_ptr, i_c, n_blocks, PER_ROW)
    o_m, o_k, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_m = o_m < T - i * BLOCK_M
    begin = row * T + i * BLOCK_M
    at, o_mk, m_mk = begin * H + i_h, o_m[:, None] * (H * K) + o_k[None, :], m_m[:, None] & (o_k < K)[None, :]
    b_q = tl.load(q_ptr + at * K + o_mk, mask=m_mk, other=0.0)
    m_mv = m_m[:, None] & (o_v < V)[None, :]
    b_do = tl.load(do_ptr + at * V + o_m[:, None] * (H * V) + o_v[None, :], mask=m_mv, other=0.0)
    stats_ptr += i_h * n_rows + begin
    b_m = tl.load(stats_ptr + o_m, mask=m_m, other=float("inf"))
    b_l = tl.load(stats_ptr + H * n_rows + o_m, mask=m_m, other=0.0)
    b_d = tl.load(d_ptr + i_h * n_rows + begin + o_m, mask=m_m, other=0.0)
    if PER_ROW:
        label_ptr += row * T
        mask_ptr += row * S * (4 if TWO else 2)
    label = tl.load(label_ptr + i * BLOCK_M + o_m, mask=m_m, other=0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    rate = scale * LOG2E
    k_ptr += (row * S * HK + i_hk) * K
    v_ptr += (row * S * HK + i_hk) * V
    for r in range(masked, full):
        b_dq = _bwd_queries_part(
            b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr, v_ptr, label, mask_ptr, S,
            tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate,
            HK, K, V, True, TWO, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    for r in range(full, over):
        b_dq = _bwd_queries_part(
            b_q, b_do, b_m, b_l, b_d, b_dq, k_ptr, v_ptr, label, mask_ptr, S,
            tl.load(spans_ptr + 2 * r), tl.load(spans_ptr + 2 * r + 1), rate,
            HK, K, V, False, TWO, PRECISION, BLOCK_N, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    tl.store(dq_ptr + at * K + o_mk, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_mk)


def attention_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, T, H, V) and L (B, T, H) float32 under a mask."""
    K, V = q.shape[3], v.shape[3]
    if scale <= 0:  # the kernels take the largest product for the largest score
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    at, visible = Launch.of(K, V, q.dtype), mask.visible
    runs_of_keys, runs_of_queries = mask.runs(at.fwd.m, at.fwd.n), mask.runs(at.keys.m, at.keys.n, of_keys=True)
    return attention_fwd(
        q, k, v, visible.label, visible.stacked(), *runs_of_keys, *runs_of_queries, scale, mask.pairs()
    )[:2]  # fmt: skip


@torch.library.custom_op("zoo::attention_fwd", mutates_args=())
@dispatch.on_its_device
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor,
    label: Tensor, intervals: Tensor, offsets: Tensor, spans: Tensor, k_offsets: Tensor, k_spans: Tensor,
    scale: float, pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, K), k (B, S, HK, K), v (B, S, HK, V) -> o (B, T, H, V), L (B, T, H) float32, (m, log2 l) (2, H, B T).

    label (1 or B, T), intervals (1 or B, 2 or 4, S): a Visible, its intervals stacked. offsets, spans: its Runs in
    blocks of Launch.fwd; k_offsets, k_spans: those of keys, in blocks of Launch.keys. scale > 0. pairs: how many
    (query, key) pairs see each other, for counting operations only.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (B, T, H, K), (S, HK, V) = q.shape, v.shape[1:]
    at = Launch.of(K, V, q.dtype)
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    stats = q.new_empty(2, H, B * T, dtype=torch.float32)
    label, intervals = label.contiguous(), intervals.contiguous()
    options = {"per_row": len(label) > 1, "two": intervals.shape[1] == 4}
    blocks = triton.cdiv(T, at.fwd.m)
    if B * blocks:
        attention_fwd_kernel[B * blocks, H](
            q, k, v, o, lse, stats, label, intervals, offsets, spans, T, S, blocks, B * T, scale,
            **at.constants(at.fwd, H, HK, K, V, **options), num_warps=at.fwd.warps, num_stages=at.fwd.stages,
        )  # fmt: skip
    return o, lse, stats


@attention_fwd.register_fake
def _(q, k, v, *rest):
    B, T, H, _ = q.shape
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    return q.new_empty(B, T, H, v.shape[3]), lse, lse.new_empty(2, H, B * T)


@torch.library.custom_op("zoo::attention_bwd", mutates_args=())
@dispatch.on_its_device
def attention_bwd(
    do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, stats: Tensor, q: Tensor, k: Tensor, v: Tensor,
    label: Tensor, intervals: Tensor, offsets: Tensor, spans: Tensor, k_offsets: Tensor, k_spans: Tensor,
    scale: float, pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    do, dlse, q, k, v = (x.contiguous() for x in (do, dlse, q, k, v))
    (B, T, H, K), (S, HK, V) = q.shape, v.shape[1:]
    at = Launch.of(K, V, q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d = torch.empty_like(stats[0])
    label, intervals = label.contiguous(), intervals.contiguous()
    options = {"per_row": len(label) > 1, "two": intervals.shape[1] == 4}
    blocks, k_blocks = triton.cdiv(T, at.queries.m), triton.cdiv(S, at.keys.n)
    if B * blocks:
        attention_bwd_rows_kernel[triton.cdiv(B * T, BLOCK_R), H](
            o, do, lse, dlse, d, B * T, H=H, V=V, BLOCK_R=BLOCK_R, BLOCK_V=at.block_v
        )
        attention_bwd_queries_kernel[B * blocks, H](
            q, k, v, do, stats, d, dq, label, intervals, offsets, spans, T, S, blocks, B * T, scale,
            **at.constants(at.queries, H, HK, K, V, **options), num_warps=at.queries.warps,
            num_stages=at.queries.stages,
        )  # fmt: skip
    if B * k_blocks:
        attention_bwd_keys_kernel[B * k_blocks, HK](
            q, k, v, do, stats, d, dk, dv, label, intervals, k_offsets, k_spans, T, S, k_blocks, B * T, scale,
            **at.constants(at.keys, H, HK, K, V, **options), num_warps=at.keys.warps, num_stages=at.keys.stages,
        )  # fmt: skip
    return dq, dk, dv


@attention_bwd.register_fake
def _(do, dlse, o, lse, stats, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.pairs = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, *tensors)


@first_order("attention")
def _backward(ctx, do, dlse, _dstats):
    return *attention_bwd(do, dlse, *ctx.saved_tensors, ctx.scale, ctx.pairs), *(None,) * 8


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
    """Heads of the published models (64; 128 with four query heads a key head), and 16 to 256; masks of either kind."""
    cases = []
    for K, V, G, per_row, two, dtypes in (
        (64, 64, 1, False, False, "both"),
        (64, 64, 1, True, True, "both"),
        (128, 128, 4, False, False, "both"),
        (128, 128, 4, True, True, "both"),
        (256, 256, 4, True, False, "both"),
        (16, 16, 1, False, False, "both"),
        (64, 64, 1, True, False, "bf16"),
        (100, 256, 1, False, True, "bf16"),
        (256, 32, 1, False, False, "bf16"),
    ):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if dtypes in ("both", name):
                cases += _cases(K, V, G, per_row, two, name, dtype)
    return cases


def _cases(K: int, V: int, G: int, per_row: bool, two: bool, name: str, dtype: torch.dtype) -> list[KernelCase]:
    at = Launch.of(K, V, dtype)
    types = {f"{x}_ptr": f"*{name}" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")}
    types |= {f"{x}_ptr": "*fp32" for x in ("lse", "dlse", "stats", "d")}
    labels = "*i64" if two else "*i32"
    types |= {f"{x}_ptr": labels for x in ("label", "mask")}
    types |= {"offsets_ptr": "*i32", "spans_ptr": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("T", "S", "n_blocks", "n_rows"), "i32")
    label = f"{name} K={K} V={V}" + (" a mask a row" if per_row else "") + (" two intervals" if two else "")
    cases = []
    for kernel, tile in (
        (attention_fwd_kernel, at.fwd),
        (attention_bwd_queries_kernel, at.queries),
        (attention_bwd_keys_kernel, at.keys),
    ):
        constants = at.constants(tile, 4 * G, 4, K, V, per_row, two)
        signature = {x: t for x, t in types.items() if x in kernel.arg_names}
        cases.append(KernelCase(kernel, signature, constants, tile.warps, tile.stages, tile.spills, label))
    constants = {"H": 4 * G, "V": V, "BLOCK_R": BLOCK_R, "BLOCK_V": at.block_v}
    signature = {x: t for x, t in types.items() if x in attention_bwd_rows_kernel.arg_names}
    return [*cases, KernelCase(attention_bwd_rows_kernel, signature, constants, label=label)]
