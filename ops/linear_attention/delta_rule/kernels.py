"""Triton kernels of the delta rule in chunks, forward and backward; the equations are those of `chunked.py`.

Forward: `gates` (what decays do to states) and `inverse` (X) for all chunks at once, `states` (U and S, along each
document), `output` (O, all chunks at once). Backward: X, U and S again instead of keeping them; `grad_local` (P^T dO),
`grad_states` (dR and dS, against time), then for all chunks at once `grad_scores` (gradients of the C x C matrices,
values, and their parts of dbeta and dg) and `grad_keys` (dq, dk and the other parts). A transposed product is computed
as such or passes through memory: `tl.trans` of a dot's result that feeds another dot gives wrong numbers on Hopper
(fla-org/flash-linear-attention#640).
"""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.decay_kernels import across, between, log_sums
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase


@triton.jit
def _rows(ptr, o_c, m_c, o_d, H, D: tl.constexpr):
    """Rows o_c and columns o_d of a (T, H, D) tensor whose pointer stands at the chunk's first row."""
    return tl.load(ptr + o_c[:, None] * (H * D) + o_d[None, :], mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _log_decay(g_ptr, o_c, m_c, H, HAS_G: tl.constexpr):
    """b, the cumulative log decay of a chunk, in float64."""
    if HAS_G:
        return log_sums(tl.load(g_ptr + o_c * H, mask=m_c, other=0.0).to(tl.float32))
    else:
        return tl.zeros_like(o_c).to(tl.float32)


@triton.jit
def _between(b_b, o_c, HAS_G: tl.constexpr):
    """lower(exp(b_i - b_j)), masked before the exponential."""
    if HAS_G:
        return between(b_b, o_c, False)
    else:
        return (o_c[:, None] >= o_c[None, :]).to(tl.float32)


@triton.jit
def _at_ends(ends_ptr, o_c, m_c, n_rows, H):
    """What `gates` made of a chunk: exp of the sums of g up to each token, after each of them, and over the chunk."""
    b_before = tl.load(ends_ptr + o_c * H, mask=m_c, other=1.0)
    b_after = tl.load(ends_ptr + n_rows + o_c * H, mask=m_c, other=1.0)
    return b_before, b_after, tl.min(b_before, 0)  # sums of g only fall


@triton.jit
def _exp(b_b):
    """exp of sums of log decays, or of their differences, in float32."""
    return tl.exp(b_b.to(tl.float32))


@triton.jit
def _unit_lower_inverse(b_a, o_c, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """(I + A)^-1 for strictly lower A, by doubling: of two neighbouring blocks, X_21 = -X_22 A_21 X_11.

    All pairs of blocks of one size are joined in one product: A masked to their lower left blocks, between two X.
    """
    o_i, o_j = o_c[:, None], o_c[None, :]
    b_x = (o_i == o_j).to(tl.float32) - tl.where((o_i == o_j + 1) & (o_j % 2 == 0), b_a, 0.0)
    for level in range(1, LEVELS):  # blocks of 2^level rows are inverted; unrolled, this spills
        m_pair = ((o_i >> level) == (o_j >> level) + 1) & ((o_j >> level) % 2 == 0)
        b_ax = tl.dot(tl.where(m_pair, b_a, 0.0), b_x, input_precision=EXACT)
        b_x -= tl.dot(b_x, b_ax, input_precision=EXACT)
    return b_x


@triton.jit
def delta_rule_gates_kernel(
    g_ptr, ends_ptr,  # (BT, H), (2, BT, H) fp32
    begin_ptr, end_ptr, n_rows,
    H, C: tl.constexpr,
):  # fmt: skip
    """exp of the sums of a chunk's gates up to each token and after each: sums, none a difference of longer ones."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    o_c = tl.arange(0, C)
    m_c = o_c < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    b_g = tl.minimum(tl.load(g_ptr + row + o_c * H, mask=m_c, other=0.0).to(tl.float32), 0.0)
    tl.store(ends_ptr + row + o_c * H, tl.exp(tl.cumsum(b_g, 0)), mask=m_c)
    b_after = tl.sum(tl.where(o_c[:, None] < o_c[None, :], b_g[None, :], 0.0), 1)
    tl.store(ends_ptr + n_rows + row + o_c * H, tl.exp(b_after), mask=m_c)


@triton.jit
def delta_rule_inverse_kernel(
    k_ptr, beta_ptr, g_ptr, x_ptr,  # (BT, H, K), (BT, H), (BT, H), (G, H, C, C) fp32
    begin_ptr, end_ptr,
    H, K: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """X = (I + A)^-1, in one part of PART = 2^LEVELS rows or in two, C = 2 PART, that are joined."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    n = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    k_ptr += row * K
    x_ptr += (i_c * H + i_h) * (C * C)
    o_1 = tl.arange(0, PART)
    o_2 = PART + o_1
    m_1, m_2 = o_1 < n, o_2 < n
    b_11 = tl.zeros([PART, PART], dtype=tl.float32)
    b_21 = tl.zeros([PART, PART], dtype=tl.float32)
    b_22 = tl.zeros([PART, PART], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_k1 = _rows(k_ptr, o_1, m_1, o_k, H, K)
        b_11 += tl.dot(b_k1, tl.trans(b_k1), input_precision=PRECISION)
        if C > PART:
            b_k2 = _rows(k_ptr, o_2, m_2, o_k, H, K)
            b_21 += tl.dot(b_k2, tl.trans(b_k1), input_precision=PRECISION)
            b_22 += tl.dot(b_k2, tl.trans(b_k2), input_precision=PRECISION)
    b_beta1 = tl.load(beta_ptr + row + o_1 * H, mask=m_1, other=0.0).to(tl.float32)
    b_b1 = _log_decay(g_ptr + row, o_1, m_1, H, HAS_G)
    b_x11 = _unit_lower_inverse(b_11 * b_beta1[:, None] * _between(b_b1, o_1, HAS_G), o_1, LEVELS, EXACT)
    o_x = o_1[:, None] * C + o_1[None, :]
    tl.store(x_ptr + o_x, b_x11)
    if C > PART:
        b_beta2 = tl.load(beta_ptr + row + o_2 * H, mask=m_2, other=0.0).to(tl.float32)
        b_b2 = _log_decay(g_ptr + row, o_2, m_2, H, HAS_G)  # from the second part's start
        b_x22 = _unit_lower_inverse(b_22 * b_beta2[:, None] * _between(b_b2, o_1, HAS_G), o_1, LEVELS, EXACT)
        b_21 *= b_beta2[:, None]
        if HAS_G:  # two exponents <= 0 instead of their sum
            b_21 *= _exp(b_b2)[:, None] * _exp(tl.min(b_b1, 0) - b_b1)[None, :]
        b_ax = tl.dot(b_21, b_x11, input_precision=EXACT)
        b_x21 = -tl.dot(b_x22, b_ax, input_precision=EXACT)
        tl.store(x_ptr + o_x + PART, tl.zeros([PART, PART], dtype=tl.float32))
        tl.store(x_ptr + o_x + PART * C, b_x21)
        tl.store(x_ptr + o_x + PART * C + PART, b_x22)


@triton.jit
def delta_rule_states_kernel(
    k_ptr, v_ptr, beta_ptr, ends_ptr, x_ptr, s0_ptr,  # (BT, H, K), (BT, H, V), (BT, H), of `gates`, (G, H, C, C), ...
    u_ptr, before_ptr, s_ptr,  # (BT, H, V), (G, H, K, V) both in the dtype of v; (N, H, K, V) fp32, as s0
    begin_ptr, end_ptr, offsets_ptr, n_rows,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Along one document: keep S before each chunk, U = X diag(beta) (V - diag(e^b) K S), then the next S."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_c, o_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    first, last = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    begin = tl.load(begin_ptr + first, mask=first < last, other=0)  # an empty document has no chunk to ask
    end = tl.load(end_ptr + last - 1, mask=first < last, other=0)
    b_s = tl.load(s0_ptr + i_nh * (K * V) + o_s, mask=m_s, other=0.0)
    for i_c in range(first, last):
        start = begin + (i_c - first) * C
        row = start * H + i_h
        m_c = o_c < (end - start).to(tl.int32)
        b_s_in = b_s.to(v_ptr.dtype.element_ty)
        tl.store(before_ptr + (i_c * H + i_h) * (K * V) + o_s, b_s_in, mask=m_s)
        b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
        b_v = _rows(v_ptr + row * V, o_c, m_c, o_v, H, V).to(tl.float32)
        b_beta = tl.load(beta_ptr + row + o_c * H, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.load(x_ptr + (i_c * H + i_h) * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_held = tl.dot(b_k, b_s_in, input_precision=PRECISION)
        if HAS_G:
            b_before, b_after, total = _at_ends(ends_ptr + row, o_c, m_c, n_rows, H)
            b_held *= b_before[:, None]
        b_u = tl.dot(b_x, b_beta[:, None] * (b_v - b_held), input_precision=PRECISION)
        m_u = m_c[:, None] & (o_v < V)[None, :]
        tl.store(u_ptr + row * V + o_c[:, None] * (H * V) + o_v[None, :], b_u.to(u_ptr.dtype.element_ty), mask=m_u)
        if HAS_G:
            b_u *= b_after[:, None]
            b_s *= total
        b_s += tl.dot(tl.trans(b_k), b_u.to(b_k.dtype), input_precision=PRECISION)
    tl.store(s_ptr + i_nh * (K * V) + o_s, b_s, mask=m_s)


@triton.jit
def delta_rule_output_kernel(
    q_ptr, k_ptr, g_ptr, u_ptr, before_ptr, o_ptr,  # (BT, H, K) x 2, (BT, H), (BT, H, V), (G, H, K, V), (BT, H, V)
    begin_ptr, end_ptr, scale,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = scale (diag(e^b) Q S + lower(Q K^T * G) U)."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    o_c = tl.arange(0, C)
    m_c = o_c < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    s_ptr = before_ptr + (i_c * H + i_h) * (K * V)
    b_o = tl.zeros([C, BLOCK_V], dtype=tl.float32)
    b_p = tl.zeros([C, C], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_q = _rows(q_ptr + row * K, o_c, m_c, o_k, H, K)
        b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
        b_s = tl.load(s_ptr + o_k[:, None] * V + o_v[None, :], mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
        b_o += tl.dot(b_q, b_s, input_precision=PRECISION)
        b_p += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_b = _log_decay(g_ptr + row, o_c, m_c, H, HAS_G)
    if HAS_G:
        b_o *= _exp(b_b)[:, None]
    b_u = _rows(u_ptr + row * V, o_c, m_c, o_v, H, V)
    b_p *= _between(b_b, o_c, HAS_G)
    b_o += tl.dot(b_p.to(b_u.dtype), b_u, input_precision=PRECISION)
    m_o = m_c[:, None] & (o_v < V)[None, :]
    o_o = o_c[:, None] * (H * V) + o_v[None, :]
    tl.store(o_ptr + row * V + o_o, (scale * b_o).to(o_ptr.dtype.element_ty), mask=m_o)


@triton.jit
def delta_rule_grad_local_kernel(
    q_ptr, k_ptr, g_ptr, do_ptr, du_ptr,  # (BT, H, K) x 2, (BT, H), (BT, H, V) x 2
    begin_ptr, end_ptr, scale,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU as far as the chunk's own outputs give it: P^T dO, with P^T computed as K Q^T."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    o_c = tl.arange(0, C)
    m_c = o_c < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    b_pt = tl.zeros([C, C], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_q = _rows(q_ptr + row * K, o_c, m_c, o_k, H, K)
        b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
        b_pt += tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if HAS_G:
        b_pt *= between(_log_decay(g_ptr + row, o_c, m_c, H, HAS_G), o_c, True)
    else:
        b_pt = tl.where(o_c[:, None] <= o_c[None, :], b_pt, 0.0)
    b_do = _rows(do_ptr + row * V, o_c, m_c, o_v, H, V)
    b_du = scale * tl.dot(b_pt.to(b_do.dtype), b_do, input_precision=PRECISION)
    m_u = m_c[:, None] & (o_v < V)[None, :]
    tl.store(du_ptr + row * V + o_c[:, None] * (H * V) + o_v[None, :], b_du.to(du_ptr.dtype.element_ty), mask=m_u)


@triton.jit
def delta_rule_grad_states_kernel(
    q_ptr, k_ptr, beta_ptr, ends_ptr, x_ptr, do_ptr, du_ptr, ds_ptr,  # du: P^T dO, (BT, H, V); ds: (N, H, K, V) fp32
    dr_ptr, after_ptr, ds0_ptr,  # (BT, H, V), (G, H, K, V) both in the dtype of v; (N, H, K, V) fp32
    begin_ptr, end_ptr, offsets_ptr, scale, n_rows,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Against time: keep dS after each chunk, dR = X^T (P^T dO + diag(e^{b_C - b}) K dS), then dS before it."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_c, o_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    first, last = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    begin = tl.load(begin_ptr + first, mask=first < last, other=0)
    end = tl.load(end_ptr + last - 1, mask=first < last, other=0)
    b_ds = tl.load(ds_ptr + i_nh * (K * V) + o_s, mask=m_s, other=0.0)
    for i in range(first, last):
        i_c = last - 1 - (i - first)
        start = begin + (i_c - first) * C
        row = start * H + i_h
        m_c = o_c < (end - start).to(tl.int32)
        b_ds_out = b_ds.to(do_ptr.dtype.element_ty)
        tl.store(after_ptr + (i_c * H + i_h) * (K * V) + o_s, b_ds_out, mask=m_s)
        b_q = _rows(q_ptr + row * K, o_c, m_c, o_k, H, K)
        b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
        b_do = _rows(do_ptr + row * V, o_c, m_c, o_v, H, V)
        b_du = _rows(du_ptr + row * V, o_c, m_c, o_v, H, V).to(tl.float32)
        b_beta = tl.load(beta_ptr + row + o_c * H, mask=m_c, other=0.0).to(tl.float32)
        b_xt = tl.load(x_ptr + (i_c * H + i_h) * (C * C) + o_c[None, :] * C + o_c[:, None])
        b_kds = tl.dot(b_k, b_ds_out, input_precision=PRECISION)
        if HAS_G:
            b_before, b_after, total = _at_ends(ends_ptr + row, o_c, m_c, n_rows, H)
            b_kds *= b_after[:, None]
            b_do = (b_do * b_before[:, None]).to(b_do.dtype)
            b_beta *= b_before
            b_ds *= total
        b_dr = tl.dot(b_xt, b_du + b_kds, input_precision=PRECISION)
        m_u = m_c[:, None] & (o_v < V)[None, :]
        tl.store(dr_ptr + row * V + o_c[:, None] * (H * V) + o_v[None, :], b_dr.to(dr_ptr.dtype.element_ty), mask=m_u)
        b_ds += tl.dot(tl.trans(b_q), (b_do * scale).to(b_q.dtype), input_precision=PRECISION)
        b_ds -= tl.dot(tl.trans(b_k), (b_dr * b_beta[:, None]).to(b_k.dtype), input_precision=PRECISION)
    tl.store(ds0_ptr + i_nh * (K * V) + o_s, b_ds, mask=m_s)


@triton.jit
def delta_rule_grad_scores_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, u_ptr, do_ptr, dr_ptr,  # (BT, H, K) x 2, (BT, H, V), (BT, H) x 2, ...
    dp_ptr, dm_ptr, dv_ptr, dbeta_ptr, dg_ptr,  # (G, H, C, C) x 2, (BT, H, V), (1 + NK, BT, H) fp32 x 2: part 0
    begin_ptr, end_ptr, scale,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of Q K^T and K K^T, of the values, and what reaches beta and g through them."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    o_c = tl.arange(0, C)
    m_c = o_c < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    b_beta = tl.load(beta_ptr + row + o_c * H, mask=m_c, other=0.0).to(tl.float32)
    b_dbeta = tl.zeros([C], dtype=tl.float32)
    b_dp = tl.zeros([C, C], dtype=tl.float32)
    b_dm = tl.zeros([C, C], dtype=tl.float32)
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_u = _rows(u_ptr + row * V, o_c, m_c, o_v, H, V)
        b_do = _rows(do_ptr + row * V, o_c, m_c, o_v, H, V)
        b_dr = _rows(dr_ptr + row * V, o_c, m_c, o_v, H, V)
        b_v = _rows(v_ptr + row * V, o_c, m_c, o_v, H, V)
        b_dp += tl.dot(b_do, tl.trans(b_u), input_precision=PRECISION)
        b_dm -= tl.dot(b_dr, tl.trans(b_u), input_precision=PRECISION)
        b_dbeta += tl.sum(b_dr.to(tl.float32) * b_v.to(tl.float32), 1)
        b_dv = b_beta[:, None] * b_dr.to(tl.float32)
        m_v = m_c[:, None] & (o_v < V)[None, :]
        tl.store(dv_ptr + row * V + o_c[:, None] * (H * V) + o_v[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=m_v)
    b_b = _log_decay(g_ptr + row, o_c, m_c, H, HAS_G)
    b_between = _between(b_b, o_c, HAS_G)
    m_strict = o_c[:, None] > o_c[None, :]
    b_dp *= scale * b_between
    b_dm = tl.where(m_strict, b_dm, 0.0) * b_between  # of beta_i (k_i . k_j)
    b_kk = tl.zeros([C, C], dtype=tl.float32)
    b_qk = tl.zeros([C, C], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_q = _rows(q_ptr + row * K, o_c, m_c, o_k, H, K)
        b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
        b_kk += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        if HAS_G:
            b_qk += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dbeta += tl.sum(b_dm * b_kk, 1)
    tl.store(dbeta_ptr + row + o_c * H, b_dbeta, mask=m_c)
    b_dm *= b_beta[:, None]
    if HAS_G:  # of b_i - b_j, the sum of g from j + 1 to i
        tl.store(dg_ptr + row + o_c * H, across(b_dp * b_qk + b_dm * b_kk, o_c), mask=m_c)
    o_x = (i_c * H + i_h) * (C * C) + o_c[:, None] * C + o_c[None, :]
    tl.store(dp_ptr + o_x, b_dp.to(dp_ptr.dtype.element_ty))
    tl.store(dm_ptr + o_x, b_dm.to(dm_ptr.dtype.element_ty))


@triton.jit
def _sum_from(b_x, o_c):
    """Sum over the places i >= m."""
    return tl.sum(tl.where(o_c[None, :] >= o_c[:, None], b_x[None, :], 0.0), 1)


@triton.jit
def _sum_before(b_x, o_c):
    """Sum over the places j < m, never as a difference: the own place may be far larger."""
    return tl.sum(tl.where(o_c[None, :] < o_c[:, None], b_x[None, :], 0.0), 1)


@triton.jit
def delta_rule_grad_keys_kernel(
    q_ptr, k_ptr, beta_ptr, ends_ptr, u_ptr, do_ptr, dr_ptr, before_ptr, after_ptr, dp_ptr, dm_ptr,
    dq_ptr, dk_ptr, dbeta_ptr, dg_ptr,  # (BT, H, K) x 2, (1 + NK, BT, H) fp32 x 2: part 1 + i_k
    begin_ptr, end_ptr, scale, n_rows,
    H, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys, and what reaches beta and g through the states."""
    i_c, i_h, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin = tl.load(begin_ptr + i_c)
    o_c = tl.arange(0, C)
    m_c = o_c < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = begin * H + i_h
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_s = (i_c * H + i_h) * (K * V)
    b_dread = tl.zeros([C, BLOCK_K], dtype=tl.float32)  # of diag(scale e^b) Q
    b_derase = tl.zeros([C, BLOCK_K], dtype=tl.float32)  # of diag(beta e^b) K
    b_dwrite = tl.zeros([C, BLOCK_K], dtype=tl.float32)  # of diag(e^{b_C - b}) K
    b_both = tl.zeros([BLOCK_V, BLOCK_K], dtype=tl.float32)  # S * dS_next
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_u = _rows(u_ptr + row * V, o_c, m_c, o_v, H, V)
        b_do = _rows(do_ptr + row * V, o_c, m_c, o_v, H, V)
        b_dr = _rows(dr_ptr + row * V, o_c, m_c, o_v, H, V)
        o_t = o_s + o_v[:, None] + o_k[None, :] * V  # states transposed, (V, K)
        m_t = (o_v < V)[:, None] & (o_k < K)[None, :]
        b_st = tl.load(before_ptr + o_t, mask=m_t, other=0.0)
        b_dst = tl.load(after_ptr + o_t, mask=m_t, other=0.0)
        b_dread += tl.dot(b_do, b_st, input_precision=PRECISION)
        b_derase -= tl.dot(b_dr, b_st, input_precision=PRECISION)
        b_dwrite += tl.dot(b_u, b_dst, input_precision=PRECISION)
        if HAS_G:
            b_both += b_st.to(tl.float32) * b_dst.to(tl.float32)
    b_q = _rows(q_ptr + row * K, o_c, m_c, o_k, H, K)
    b_k = _rows(k_ptr + row * K, o_c, m_c, o_k, H, K)
    b_beta = tl.load(beta_ptr + row + o_c * H, mask=m_c, other=0.0).to(tl.float32)
    o_part = (i_k + 1).to(tl.int64) * n_rows + row
    b_dread *= scale
    if HAS_G:
        b_before, b_after, total = _at_ends(ends_ptr + row, o_c, m_c, n_rows, H)
        b_dread *= b_before[:, None]
        b_derase *= b_before[:, None]
        b_dwrite *= b_after[:, None]
    b_dbeta = tl.sum(b_derase * b_k, 1)
    tl.store(dbeta_ptr + o_part + o_c * H, b_dbeta, mask=m_c)
    if HAS_G:
        b_dg = _sum_from(tl.sum(b_dread * b_q, 1) + b_beta * b_dbeta, o_c)
        b_dg += _sum_before(tl.sum(b_dwrite * b_k, 1), o_c) + total * tl.sum(b_both)
        tl.store(dg_ptr + o_part + o_c * H, b_dg, mask=m_c)
    o_x = (i_c * H + i_h) * (C * C) + o_c[:, None] * C + o_c[None, :]
    o_xt = (i_c * H + i_h) * (C * C) + o_c[None, :] * C + o_c[:, None]
    b_dq = b_dread + tl.dot(tl.load(dp_ptr + o_x), b_k, input_precision=PRECISION)
    b_dk = b_dwrite + b_beta[:, None] * b_derase
    b_dk += tl.dot(tl.load(dp_ptr + o_xt), b_q, input_precision=PRECISION)
    b_dk += tl.dot(tl.load(dm_ptr + o_x), b_k, input_precision=PRECISION)
    b_dk += tl.dot(tl.load(dm_ptr + o_xt), b_k, input_precision=PRECISION)
    m_q = m_c[:, None] & (o_k < K)[None, :]
    o_q = row * K + o_c[:, None] * (H * K) + o_k[None, :]
    tl.store(dq_ptr + o_q, b_dq.to(dq_ptr.dtype.element_ty), mask=m_q)
    tl.store(dk_ptr + o_q, b_dk.to(dk_ptr.dtype.element_ty), mask=m_q)


class Blocks(NamedTuple):
    """One launch configuration, a function of (K, V, dtype) alone."""

    chunk: int  # C, tokens
    states_k: int  # the sequential kernels: the whole key, rounded up
    states_v: int
    states_warps: int
    tile_k: int  # the kernels that run on all chunks at once
    tile_v: int
    keys_k: int  # of grad_keys, which keeps three tiles


def blocks(K: int, V: int, dtype: torch.dtype) -> Blocks:
    """The configuration for keys of K and values of V numbers.

    Not tuned on a device yet: these are the largest blocks that need no register spills on sm_80 and sm_90 (see
    `compile_cases` for the one exception).
    """
    whole_k, whole_v = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    if dtype == torch.float32:
        chunk, states_v, tile = (32, 32, 32) if K <= 32 else (16, 16, 64)
    else:
        chunk, states_v, tile = (64, 32, 64) if K <= 128 else (32, 32, 64)
    return Blocks(
        chunk=chunk,
        states_k=whole_k,
        states_v=min(whole_v, states_v),
        states_warps=4 if K <= 32 else 8,
        tile_k=min(whole_k, tile),
        tile_v=min(whole_v, tile),
        keys_k=min(whole_k, tile if chunk < 64 else 32),
    )


def chunk_size(K: int, V: int, dtype: torch.dtype) -> int:
    """Tokens per chunk for which the caller cuts time."""
    return blocks(K, V, dtype).chunk


def _constants(q: Tensor, v: Tensor, g: Tensor | None, kernel: str) -> dict[str, Any]:
    """The constexpr arguments and warps of one launch."""
    K, V = q.shape[-1], v.shape[-1]
    b = blocks(K, V, q.dtype)
    sequential = kernel in ("states", "grad_states")
    constants: dict[str, Any] = {
        "K": K, "V": V, "HAS_G": g is not None, "C": b.chunk,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # of float32 operands; the others ignore it
        "BLOCK_K": b.states_k if sequential else b.keys_k if kernel == "grad_keys" else b.tile_k,
        "BLOCK_V": b.states_v if sequential else b.tile_v,
        "num_warps": b.states_warps if sequential else 4, "num_stages": 2,
    }  # fmt: skip
    if kernel == "inverse":
        del constants["V"], constants["BLOCK_V"]
        constants["PART"] = min(b.chunk, 32)
        constants["LEVELS"] = constants["PART"].bit_length() - 1
        constants["EXACT"] = dispatch.EXACT_PRODUCTS
    return constants


def _ends(g: Tensor | None, like: Tensor, begin: Tensor, end: Tensor, chunk: int) -> Tensor:
    """What the chunks' gates do to states, (2, B, T, H); nothing is made, and nothing read, without gates."""
    if g is None:
        return like
    ends = torch.empty(2, *g.shape, dtype=torch.float32, device=g.device)
    delta_rule_gates_kernel[begin.shape[0], g.shape[2]](g, ends, begin, end, g.numel(), g.shape[2], C=chunk)
    return ends


def _states(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, ends: Tensor, S0: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """X (G, H, C, C), U (B, T, H, V), the state before each chunk (G, H, K, V) and the last one (N, H, K, V)."""
    (H, K), V, G = k.shape[-2:], v.shape[-1], begin.shape[0]
    b, gate = blocks(K, V, k.dtype), beta if g is None else g
    X = torch.empty(G, H, b.chunk, b.chunk, dtype=torch.float32, device=k.device)
    U, S = torch.empty_like(v), torch.empty_like(S0)
    before = torch.empty(G, H, K, V, dtype=v.dtype, device=v.device)
    delta_rule_inverse_kernel[(G, H)](k, beta, gate, X, begin, end, H, **_constants(k, v, g, "inverse"))
    grid = (S0.shape[0] * H, triton.cdiv(V, b.states_v))
    delta_rule_states_kernel[grid](
        k, v, beta, ends, X, S0, U, before, S, begin, end, offsets, beta.numel(), H, **_constants(k, v, g, "states")
    )
    return X, U, before, S


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("zoo::delta_fwd", mutates_args=())
@dispatch.on_its_device
def delta_fwd(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q k (B, T, H, K), v (B, T, H, V), S0 (N, H, K, V) float32, fields of a ChunkTable of `chunk_size` -> o, S."""
    q, k, v, beta, g, S0 = _contiguous(q, k, v, beta, g, S0)  # type: ignore[assignment]
    H, V = v.shape[-2:]
    ends = _ends(g, beta, begin, end, blocks(q.shape[-1], V, q.dtype).chunk)
    _, U, before, S = _states(k, v, beta, g, ends, S0, begin, end, offsets)
    o = torch.empty_like(v)
    gate, n_v = beta if g is None else g, triton.cdiv(V, blocks(q.shape[-1], V, q.dtype).tile_v)
    delta_rule_output_kernel[begin.shape[0], H, n_v](
        q, k, gate, U, before, o, begin, end, scale, H, **_constants(q, v, g, "output")
    )
    return o, S


@delta_fwd.register_fake
def _(q, k, v, beta, g, S0, begin, end, offsets, scale):
    return v.new_empty(v.shape), S0.new_empty(S0.shape)


@torch.library.custom_op("zoo::delta_bwd", mutates_args=())
@dispatch.on_its_device
def delta_bwd(
    do: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g (empty without one) and S0."""
    do, dS, q, k, v, beta, g, S0 = _contiguous(do, dS, q, k, v, beta, g, S0)  # type: ignore[assignment]
    (B, T, H, K), V, G = q.shape, v.shape[-1], begin.shape[0]
    b, gate = blocks(K, V, q.dtype), beta if g is None else g
    ends = _ends(g, beta, begin, end, b.chunk)
    X, U, before, _ = _states(k, v, beta, g, ends, S0, begin, end, offsets)
    dU, dR, dv, after, dS0 = (torch.empty_like(x) for x in (v, v, v, before, S0))
    delta_rule_grad_local_kernel[G, H, triton.cdiv(V, b.tile_v)](
        q, k, gate, do, dU, begin, end, scale, H, **_constants(q, v, g, "grad_local")
    )
    grid = (S0.shape[0] * H, triton.cdiv(V, b.states_v))
    delta_rule_grad_states_kernel[grid](
        q, k, beta, ends, X, do, dU, dS, dR, after, dS0, begin, end, offsets, scale, B * T * H, H,
        **_constants(q, v, g, "grad_states"),
    )  # fmt: skip
    del X, dU
    dp = torch.empty(G, H, b.chunk, b.chunk, dtype=q.dtype, device=q.device)
    dm, dq, dk = torch.empty_like(dp), torch.empty_like(q), torch.empty_like(k)
    n_k = triton.cdiv(K, b.keys_k)
    dbeta = torch.empty(1 + n_k, B, T, H, dtype=torch.float32, device=q.device)
    dg = torch.empty_like(dbeta) if g is not None else dbeta
    delta_rule_grad_scores_kernel[(G, H)](
        q, k, v, beta, gate, U, do, dR, dp, dm, dv, dbeta, dg, begin, end, scale, H,
        **_constants(q, v, g, "grad_scores"),
    )  # fmt: skip
    delta_rule_grad_keys_kernel[(G, H, n_k)](
        q, k, beta, ends, U, do, dR, before, after, dp, dm, dq, dk, dbeta, dg, begin, end, scale, B * T * H, H,
        **_constants(q, v, g, "grad_keys"),
    )  # fmt: skip
    gate_gradient = beta.new_empty(0) if g is None else dg.sum(0).to(g.dtype)
    return dq, dk, dv, dbeta.sum(0).to(beta.dtype), gate_gradient, dS0


@delta_bwd.register_fake
def _(do, dS, q, k, v, beta, g, S0, begin, end, offsets, scale):
    like = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    return *like, beta.new_empty(0) if g is None else g.new_empty(g.shape), S0.new_empty(S0.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


@first_order("delta_rule")
def _backward(ctx, do, dS):
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    dq, dk, dv, dbeta, dg, dS0 = delta_bwd(do, dS, *saved, ctx.scale)
    return dq, dk, dv, dbeta, None if saved[4] is None else dg, dS0, None, None, None, None


delta_fwd.register_autograd(_backward, setup_context=_save)


def _products(q_shape: torch.Size, v_shape: torch.Size) -> tuple[int, int, int]:
    """Multiply-adds of all tokens with a chunk's keys, its values, and a state."""
    (B, T, H, K), V, C = q_shape, v_shape[-1], 64
    return B * T * H * C * K, B * T * H * C * V, B * T * H * K * V


@register_flop_formula(torch.ops.zoo.delta_fwd)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    keys, values, states = _products(q_shape, v_shape)
    return 2 * (2 * keys + 2 * values + 3 * states)


@register_flop_formula(torch.ops.zoo.delta_bwd)
def _flops_bwd(do_shape, dS_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    keys, values, states = _products(q_shape, v_shape)
    return 2 * (7 * keys + 5 * values + 8 * states)


_POINTERS = {  # where an argument's type is not that of q
    "x_ptr": "*fp32", "s0_ptr": "*fp32", "s_ptr": "*fp32", "ds_ptr": "*fp32", "ds0_ptr": "*fp32", "dbeta_ptr": "*fp32",
    "ends_ptr": "*fp32", "dg_ptr": "*fp32", "begin_ptr": "*i64", "end_ptr": "*i64", "offsets_ptr": "*i64",
    "H": "i32", "n_rows": "i32", "scale": "fp32",
}  # fmt: skip


def compile_cases() -> list[KernelCase]:
    """What the published models launch: DeltaNet (128, 128), Gated DeltaNet (256, 512), and the tiny sizes."""
    cases = []
    for (K, V, gated), dtype in itertools.product(
        ((128, 128, False), (256, 512, True), (64, 64, True), (16, 16, False)), (torch.bfloat16, torch.float32)
    ):
        q, v = torch.empty(1, 1, 1, K, dtype=dtype, device="meta"), torch.empty(1, 1, 1, V, dtype=dtype, device="meta")
        io = "*fp32" if dtype == torch.float32 else "*bf16"
        if gated:
            chunk = {"C": blocks(K, V, dtype).chunk}
            signature = {a: _POINTERS.get(a, io) for a in delta_rule_gates_kernel.arg_names if a != "C"}
            cases.append(KernelCase(delta_rule_gates_kernel, signature, chunk, label=f"K={K} V={V} {io[1:]}"))
        for kernel in (
            delta_rule_inverse_kernel, delta_rule_states_kernel, delta_rule_output_kernel, delta_rule_grad_local_kernel,
            delta_rule_grad_states_kernel, delta_rule_grad_scores_kernel, delta_rule_grad_keys_kernel,
        ):  # fmt: skip
            name = kernel.__name__.removeprefix("delta_rule_").removesuffix("_kernel")
            constants = _constants(q, v, q if gated else None, name)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            # IEEE float32 products of 256-long keys hold whole rows of operands; training runs in bfloat16
            spills = 640 if K == 256 and io == "*fp32" and name.endswith("states") else 0
            if name == "grad_keys" and K == V == 128 and io == "*bf16" and triton.__version__.startswith("3.6"):
                spills = 8  # on sm_80; the newer compilers need none and are allowed none
            signature = {a: _POINTERS.get(a, io) for a in kernel.arg_names if a not in constants}
            cases.append(
                KernelCase(
                    kernel, signature, constants, num_warps=warps, num_stages=stages, spills=spills,
                    label=f"K={K} V={V} {'gated ' if gated else ''}{io[1:]}",
                )
            )  # fmt: skip
    return cases
