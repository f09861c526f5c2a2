"""Triton kernels of gated linear attention, forward and backward, by chunks of CHUNK tokens.

The mathematics of a chunk, with sums of log decays that are never differences and never positive:
    F_i = g_1 + ... + g_i (inclusive),  R_j = g_{j+1} + ... + g_C (exclusive),  total = g_1 + ... + g_C
    S' = exp(total) S + (k exp(R))^T v              o = scale (q exp(F)) S + P v,  P lower triangular (C, C)
    P_ij = scale sum_k q_ik k_jk exp(g_{j+1} + ... + g_i), by blocks of SUB rows: for tokens j before the block the
    decay is split at the block's start (two factors <= 1, one matrix product); inside the block the decay of column j
    grows from that of column j + 1 by one multiplication with exp(g_{j+1}).
The gate's gradient is the gradient of these sums: q dq for F, k dk for R; pairs inside a chunk give, at step t, the sum
over i >= t of q_i dq_i - k_i dk_i. A token's weight on itself has no decay and is left out of it, so that strong gates
do not drown in rounding.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

CHUNK = 64
SUB = 16


@triton.jit
def gla_fwd_states_kernel(
    k_ptr, v_ptr, g_ptr, state_ptr, states_ptr, last_ptr,  # (T, H, K), (T, H, V), (T, H, K), (N, H, K, V), (G, H, K, V)
    begin_ptr, end_ptr, offsets_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of one document: the state before each chunk, and the last state."""
    i_nh = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_n, i_h = i_nh // H, i_nh % H
    m_k, m_v = o_k < K, o_v < V
    o_t = tl.arange(0, CHUNK)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    first, stop = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    b_S = tl.load(state_ptr + i_nh * K * V + o_s, mask=m_s, other=0.0).to(tl.float32)
    for i_c in range(first, stop):
        begin = tl.load(begin_ptr + i_c)
        size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
        tl.store(states_ptr + (i_c * H + i_h) * K * V + o_s, b_S.to(states_ptr.dtype.element_ty), mask=m_s)
        row_k, row_v = (begin * H + i_h) * K, (begin * H + i_h) * V
        m_kt = m_k[:, None] & (o_t < size)[None, :]
        m_rt = m_k[:, None] & (o_t + 1 < size)[None, :]
        o_kt = o_t[None, :] * H * K + o_k[:, None]
        b_k = tl.load(k_ptr + row_k + o_kt, mask=m_kt, other=0.0)  # [BLOCK_K, CHUNK]
        b_next = tl.load(g_ptr + row_k + H * K + o_kt, mask=m_rt, other=0.0).to(tl.float32)
        b_g1 = tl.load(g_ptr + row_k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(
            v_ptr + row_v + o_t[:, None] * H * V + o_v[None, :], mask=(o_t < size)[:, None] & m_v[None, :], other=0.0
        )
        b_k = (b_k * tl.exp(tl.cumsum(b_next, 1, reverse=True))).to(b_v.dtype)
        b_S = b_S * tl.exp(b_g1 + tl.sum(b_next, 1))[:, None]
        b_S += tl.dot(b_k, b_v, input_precision=PRECISION)
    tl.store(last_ptr + i_nh * K * V + o_s, b_S, mask=m_s)


@triton.jit
def gla_fwd_weights_kernel(
    q_ptr, k_ptr, g_ptr, p_ptr,  # (T, H, K) three times, (T, H, CHUNK)
    begin_ptr, end_ptr, scale,
    H: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights P of one block of SUB rows on the tokens of its chunk up to the block's end."""
    i_c, i_s, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1) * SUB, tl.program_id(2)
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    if i_s < size:
        row = (begin * H + i_h) * K
        q_ptr += row
        k_ptr += row
        g_ptr += row
        o_i, o_j, o_t = i_s + tl.arange(0, SUB), tl.arange(0, SUB), tl.arange(0, CHUNK)
        b_P = tl.zeros([SUB, CHUNK], dtype=tl.float32)
        b_D = tl.zeros([SUB, SUB], dtype=tl.float32)
        rows = tl.minimum(size - i_s, SUB)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            m_i = (o_i < size)[:, None] & m_k[None, :]
            b_q = tl.load(q_ptr + o_i[:, None] * H * K + o_k[None, :], mask=m_i, other=0.0)
            if i_s > 0:
                b_g = tl.load(g_ptr + o_i[:, None] * H * K + o_k[None, :], mask=m_i, other=0.0).to(tl.float32)
                o_kt = o_t[None, :] * H * K + o_k[:, None]
                b_k = tl.load(k_ptr + o_kt, mask=m_k[:, None] & (o_t < i_s)[None, :], other=0.0)  # [BLOCK_K, CHUNK]
                b_next = tl.load(g_ptr + H * K + o_kt, mask=m_k[:, None] & (o_t + 1 < i_s)[None, :], other=0.0)
                b_k = (b_k * tl.exp(tl.cumsum(b_next.to(tl.float32), 1, reverse=True))).to(b_q.dtype)
                b_P += tl.dot((b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_q.dtype), b_k, input_precision=PRECISION)
            b_q = b_q.to(tl.float32)
            b_E = tl.zeros([SUB, BLOCK_K], dtype=tl.float32)  # exp(g_{j+1} + ... + g_i), 0 for i < j
            k_row, g_row = k_ptr + (i_s + rows - 1) * H * K + o_k, g_ptr + (i_s + rows - 1) * H * K + o_k
            for r in range(rows):  # j from the last token to the first
                m_j = o_j == rows - 1 - r
                b_kj = tl.load(k_row, mask=m_k, other=0.0).to(tl.float32)
                b_gj = tl.load(g_row, mask=m_k, other=0.0).to(tl.float32)
                b_E = tl.where(m_j[:, None], 1.0, b_E)
                b_D = tl.where(m_j[None, :], b_D + tl.sum(b_q * b_E * b_kj[None, :], 1)[:, None], b_D)
                b_E *= tl.exp(b_gj)[None, :]
                k_row -= H * K
                g_row -= H * K
        p_ptr += (begin * H + i_h) * CHUNK
        m_r = (o_i < size)[:, None]
        p_rows = p_ptr + o_i[:, None] * H * CHUNK
        tl.store(p_rows + o_t[None, :], (b_P * scale).to(p_ptr.dtype.element_ty), mask=m_r & (o_t < i_s)[None, :])
        tl.store(p_rows + i_s + o_j[None, :], (b_D * scale).to(p_ptr.dtype.element_ty), mask=m_r)


@triton.jit
def gla_fwd_out_kernel(
    q_ptr, v_ptr, g_ptr, states_ptr, p_ptr, o_ptr,  # (T, H, K), (T, H, V), (T, H, K), (G, H, K, V), (T, H, CHUNK)
    begin_ptr, end_ptr, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk: what the state before it and the tokens inside it give."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < size
    q_ptr += (begin * H + i_h) * K
    g_ptr += (begin * H + i_h) * K
    states_ptr += (i_c * H + i_h) * K * V
    b_o = tl.zeros([CHUNK, BLOCK_V], dtype=tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_tk, m_tk = o_t[:, None] * H * K + o_k[None, :], m_t[:, None] & m_k[None, :]
        b_q = tl.load(q_ptr + o_tk, mask=m_tk, other=0.0)
        b_g = tl.load(g_ptr + o_tk, mask=m_tk, other=0.0).to(tl.float32)
        b_S = tl.load(states_ptr + o_k[:, None] * V + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)
        b_q = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_q.dtype)
        b_o += tl.dot(b_q, b_S.to(b_q.dtype), input_precision=PRECISION)
    b_o *= scale
    o_tv, m_tv = o_t[:, None] * H * V + o_v[None, :], m_t[:, None] & m_v[None, :]
    row_v = (begin * H + i_h) * V
    b_v = tl.load(v_ptr + row_v + o_tv, mask=m_tv, other=0.0)
    m_p = m_t[:, None] & (o_t[:, None] >= o_t[None, :])
    b_P = tl.load(p_ptr + (begin * H + i_h) * CHUNK + o_t[:, None] * H * CHUNK + o_t[None, :], mask=m_p, other=0.0)
    b_o += tl.dot(b_P.to(b_v.dtype), b_v, input_precision=PRECISION)
    tl.store(o_ptr + row_v + o_tv, b_o.to(o_ptr.dtype.element_ty), mask=m_tv)


@triton.jit
def gla_bwd_states_kernel(
    q_ptr, do_ptr, g_ptr, dlast_ptr, dstates_ptr, dstate_ptr,  # like the forward; dstates: gradient after each chunk
    begin_ptr, end_ptr, offsets_ptr, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Walk backwards over the chunks of one document: the gradient of the state after each chunk and of the first."""
    i_nh = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_n, i_h = i_nh // H, i_nh % H
    m_k, m_v = o_k < K, o_v < V
    o_t = tl.arange(0, CHUNK)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    first, stop = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    b_dS = tl.load(dlast_ptr + i_nh * K * V + o_s, mask=m_s, other=0.0)
    for r in range(first, stop):
        i_c = stop - 1 - (r - first)
        begin = tl.load(begin_ptr + i_c)
        size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
        tl.store(dstates_ptr + (i_c * H + i_h) * K * V + o_s, b_dS, mask=m_s)
        row_k, row_v = (begin * H + i_h) * K, (begin * H + i_h) * V
        m_kt = m_k[:, None] & (o_t < size)[None, :]
        o_kt = o_t[None, :] * H * K + o_k[:, None]
        b_q = tl.load(q_ptr + row_k + o_kt, mask=m_kt, other=0.0)  # [BLOCK_K, CHUNK]
        b_g = tl.load(g_ptr + row_k + o_kt, mask=m_kt, other=0.0).to(tl.float32)
        b_do = tl.load(
            do_ptr + row_v + o_t[:, None] * H * V + o_v[None, :], mask=(o_t < size)[:, None] & m_v[None, :], other=0.0
        )
        b_q = (b_q * tl.exp(tl.cumsum(b_g, 1)) * scale).to(b_do.dtype)
        b_dS = b_dS * tl.exp(tl.sum(b_g, 1))[:, None]
        b_dS += tl.dot(b_q, b_do, input_precision=PRECISION)
    tl.store(dstate_ptr + i_nh * K * V + o_s, b_dS, mask=m_s)


@triton.jit
def gla_bwd_weights_kernel(
    do_ptr, v_ptr, dp_ptr,  # (T, H, V) twice, (T, H, CHUNK)
    begin_ptr, end_ptr, scale,
    H: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """scale * dP = scale * do v^T of one chunk, rows times columns; entries above the diagonal mean nothing."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < size
    row = (begin * H + i_h) * V
    b_dP = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_do = tl.load(do_ptr + row + o_t[:, None] * H * V + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0)
        b_v = tl.load(v_ptr + row + o_t[None, :] * H * V + o_v[:, None], mask=m_t[None, :] & m_v[:, None], other=0.0)
        b_dP += tl.dot(b_do, b_v, input_precision=PRECISION)
    o_p = (begin * H + i_h) * CHUNK + o_t[:, None] * H * CHUNK + o_t[None, :]
    tl.store(dp_ptr + o_p, b_dP * scale, mask=m_t[:, None])


@triton.jit
def gla_bwd_values_kernel(
    k_ptr, g_ptr, do_ptr, p_ptr, dstates_ptr, dv_ptr,  # (T, H, K) twice, (T, H, V), (T, H, CHUNK), (G, H, K, V)
    begin_ptr, end_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv = P^T do + (k exp(R)) dS of one chunk."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < size
    o_tv, m_tv = o_t[:, None] * H * V + o_v[None, :], m_t[:, None] & m_v[None, :]
    row_v = (begin * H + i_h) * V
    b_do = tl.load(do_ptr + row_v + o_tv, mask=m_tv, other=0.0)
    m_p = (o_t[:, None] <= o_t[None, :]) & m_t[None, :]  # P^T, read transposed: rows j, columns i >= j
    b_P = tl.load(p_ptr + (begin * H + i_h) * CHUNK + o_t[None, :] * H * CHUNK + o_t[:, None], mask=m_p, other=0.0)
    b_dv = tl.dot(b_P.to(b_do.dtype), b_do, input_precision=PRECISION)
    k_ptr += (begin * H + i_h) * K
    g_ptr += (begin * H + i_h) * K
    dstates_ptr += (i_c * H + i_h) * K * V
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_tk = o_t[:, None] * H * K + o_k[None, :]
        b_k = tl.load(k_ptr + o_tk, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_next = tl.load(g_ptr + H * K + o_tk, mask=(o_t + 1 < size)[:, None] & m_k[None, :], other=0.0)
        b_dS = tl.load(dstates_ptr + o_k[:, None] * V + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)
        b_k = (b_k * tl.exp(tl.cumsum(b_next.to(tl.float32), 0, reverse=True))).to(b_do.dtype)
        b_dv += tl.dot(b_k, b_dS.to(b_do.dtype), input_precision=PRECISION)
    tl.store(dv_ptr + row_v + o_tv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_tv)


@triton.jit
def gla_bwd_intra_kernel(
    q_ptr, k_ptr, g_ptr, dp_ptr, dq_ptr, dk_ptr, db_ptr,  # (T, H, K), dp (T, H, CHUNK); dq, dk and db are float32
    begin_ptr, end_ptr,
    H: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the weights inside a chunk give to SUB rows of dq and dk, and db = q dq - k dk without j = i."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    i_s = (tl.program_id(1) % (CHUNK // SUB)) * SUB
    o_k = (tl.program_id(1) // (CHUNK // SUB)) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    if i_s < size:
        row = (begin * H + i_h) * K
        q_ptr += row
        k_ptr += row
        g_ptr += row
        dp_ptr += (begin * H + i_h) * CHUNK
        m_k = o_k < K
        o_i, o_t = i_s + tl.arange(0, SUB), tl.arange(0, CHUNK)
        o_ik, m_ik = o_i[:, None] * H * K + o_k[None, :], (o_i < size)[:, None] & m_k[None, :]
        b_q = tl.load(q_ptr + o_ik, mask=m_ik, other=0.0)
        b_k = tl.load(k_ptr + o_ik, mask=m_ik, other=0.0)
        dtype = b_q.dtype
        o_tk = o_t[:, None] * H * K + o_k[None, :]
        b_dq = tl.zeros([SUB, BLOCK_K], dtype=tl.float32)
        b_dk = tl.zeros([SUB, BLOCK_K], dtype=tl.float32)
        if i_s > 0:  # tokens before the block
            b_x = tl.load(k_ptr + o_tk, mask=(o_t < i_s)[:, None] & m_k[None, :], other=0.0)
            b_d = tl.load(g_ptr + H * K + o_tk, mask=(o_t + 1 < i_s)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_x = (b_x * tl.exp(tl.cumsum(b_d, 0, reverse=True))).to(dtype)
            m_p = (o_i < size)[:, None] & (o_t < i_s)[None, :]
            b_dP = tl.load(dp_ptr + o_i[:, None] * H * CHUNK + o_t[None, :], mask=m_p, other=0.0)
            b_dq += tl.dot(b_dP.to(dtype), b_x, input_precision=PRECISION)
            b_g = tl.load(g_ptr + o_ik, mask=m_ik, other=0.0).to(tl.float32)
            b_dq *= tl.exp(tl.cumsum(b_g, 0))
        if i_s + SUB < size:  # tokens after the block
            m_l = (o_t >= i_s + SUB) & (o_t < size)
            b_x = tl.load(q_ptr + o_tk, mask=m_l[:, None] & m_k[None, :], other=0.0)
            b_d = tl.load(g_ptr + o_tk, mask=m_l[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_x = (b_x * tl.exp(tl.cumsum(b_d, 0))).to(dtype)
            b_dP = tl.load(dp_ptr + o_t[None, :] * H * CHUNK + o_i[:, None], mask=m_l[None, :], other=0.0)
            b_dk += tl.dot(b_dP.to(dtype), b_x, input_precision=PRECISION)
            m_n = (o_i + 1 < i_s + SUB)[:, None] & m_k[None, :]
            b_n = tl.load(g_ptr + H * K + o_ik, mask=m_n, other=0.0).to(tl.float32)
            b_dk *= tl.exp(tl.cumsum(b_n, 0, reverse=True))
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_E = tl.zeros([SUB, BLOCK_K], dtype=tl.float32)  # exp(g_{j+1} + ... + g_i), 0 for i <= j
        o_j, rows = tl.arange(0, SUB), tl.minimum(size - i_s, SUB)
        k_row, g_row = k_ptr + (i_s + rows - 1) * H * K + o_k, g_ptr + (i_s + rows - 1) * H * K + o_k
        dp_col = dp_ptr + o_i * H * CHUNK + i_s + rows - 1
        for r in range(rows):  # j from the last token to the first
            m_j = (o_j == rows - 1 - r)[:, None]
            b_kj = tl.load(k_row, mask=m_k, other=0.0).to(tl.float32)
            b_gj = tl.load(g_row, mask=m_k, other=0.0).to(tl.float32)
            b_W = tl.load(dp_col, mask=o_i < size, other=0.0)[:, None] * b_E
            b_dq += b_W * b_kj[None, :]
            b_dk = tl.where(m_j, b_dk + tl.sum(b_W * b_q, 0)[None, :], b_dk)
            b_E = tl.where(m_j, 1.0, b_E) * tl.exp(b_gj)[None, :]
            k_row -= H * K
            g_row -= H * K
            dp_col -= 1
        b_db = b_q * b_dq - b_k * b_dk
        b_self = tl.load(dp_ptr + o_i * H * CHUNK + o_i, mask=o_i < size, other=0.0)[:, None]
        tl.store(db_ptr + row + o_ik, b_db, mask=m_ik)
        tl.store(dq_ptr + row + o_ik, b_dq + b_self * b_k, mask=m_ik)
        tl.store(dk_ptr + row + o_ik, b_dk + b_self * b_q, mask=m_ik)


@triton.jit
def gla_bwd_inputs_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, states_ptr, dstates_ptr,  # the forward's; the states in float32
    part_dq_ptr, part_dk_ptr, part_db_ptr,  # (T, H, K) float32, from the intra kernel
    dq_ptr, dk_ptr, dg_ptr,
    begin_ptr, end_ptr, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of one chunk: what came from inside it and what passes through the states."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < size
    row_k, row_v, row_s = (begin * H + i_h) * K, (begin * H + i_h) * V, (i_c * H + i_h) * K * V
    b_dq = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    b_dk = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    b_dt = tl.zeros([BLOCK_K], dtype=tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        o_tv, m_tv = o_t[:, None] * H * V + o_v[None, :], m_t[:, None] & m_v[None, :]
        o_vk, m_vk = o_k[None, :] * V + o_v[:, None], m_v[:, None] & m_k[None, :]
        b_do = tl.load(do_ptr + row_v + o_tv, mask=m_tv, other=0.0)
        b_v = tl.load(v_ptr + row_v + o_tv, mask=m_tv, other=0.0)
        b_S = tl.load(states_ptr + row_s + o_vk, mask=m_vk, other=0.0)  # [BLOCK_V, BLOCK_K], read transposed
        b_dS = tl.load(dstates_ptr + row_s + o_vk, mask=m_vk, other=0.0)
        b_dt += tl.sum(b_S * b_dS, 0)
        b_dq += tl.dot(b_do, b_S.to(b_do.dtype), input_precision=PRECISION)
        b_dk += tl.dot(b_v, b_dS.to(b_v.dtype), input_precision=PRECISION)
    o_tk, m_tk = o_t[:, None] * H * K + o_k[None, :], m_t[:, None] & m_k[None, :]
    b_g = tl.load(g_ptr + row_k + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    b_dq *= tl.exp(tl.cumsum(b_g, 0)) * scale
    b_q = tl.load(q_ptr + row_k + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    b_db = tl.load(part_db_ptr + row_k + o_tk, mask=m_tk, other=0.0)
    b_dg = tl.cumsum(b_db + b_q * b_dq, 0, reverse=True) + (b_dt * tl.exp(tl.sum(b_g, 0)))[None, :]
    b_dq += tl.load(part_dq_ptr + row_k + o_tk, mask=m_tk, other=0.0)
    tl.store(dq_ptr + row_k + o_tk, b_dq.to(dq_ptr.dtype.element_ty), mask=m_tk)
    m_n = (o_t + 1 < size)[:, None] & m_k[None, :]
    b_next = tl.load(g_ptr + row_k + H * K + o_tk, mask=m_n, other=0.0).to(tl.float32)
    b_dk *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
    b_k = tl.load(k_ptr + row_k + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    # a write reaches the gates after it: the sum over j < t; the chunk's last write reaches none
    b_y = tl.where((o_t + 1 < size)[:, None], b_k * b_dk, 0.0)
    b_dg += tl.cumsum(b_y, 0) - b_y
    b_dk += tl.load(part_dk_ptr + row_k + o_tk, mask=m_tk, other=0.0)
    tl.store(dk_ptr + row_k + o_tk, b_dk.to(dk_ptr.dtype.element_ty), mask=m_tk)
    tl.store(dg_ptr + row_k + o_tk, b_dg.to(dg_ptr.dtype.element_ty), mask=m_tk)


class _Launch(NamedTuple):
    """What a launch needs beside its tensors, from the shapes and the dtype alone: one fixed choice, no tuning."""

    sizes: dict[str, int]  # H, K and V
    precision: str
    block_k: int
    block_v: int
    n_k: int
    n_v: int

    @classmethod
    def of(cls, H: int, K: int, V: int, dtype: torch.dtype) -> "_Launch":
        # half precision has one way only
        precision = dispatch.EXACT_PRODUCTS if dtype == torch.float32 else "tf32"
        block_k, block_v = _block(K, dtype), _block(V, dtype)
        return cls(
            {"H": H, "K": K, "V": V}, precision, block_k, block_v, triton.cdiv(K, block_k), triton.cdiv(V, block_v)
        )

    def options(self, kernel: Any) -> dict[str, Any]:
        """The constants that the kernel names, and how many warps run it."""
        constants = {"PRECISION": self.precision, "CHUNK": CHUNK, "SUB": SUB}
        constants |= {**self.sizes, "BLOCK_K": self.block_k, "BLOCK_V": self.block_v}
        many = kernel in (_FLOAT32_IN_8_WARPS if self.precision == dispatch.EXACT_PRODUCTS else _HALF_IN_8_WARPS)
        launch = {"num_warps": 8 if many else 4, "num_stages": 2}
        return {name: constants[name] for name in kernel.arg_names if name in constants} | launch

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Tensor | float) -> None:
        kernel[grid](*args, **self.options(kernel))


def _block(size: int, dtype: torch.dtype) -> int:
    """tl.dot wants at least 16 in every dimension: smaller heads are padded by masks, larger ones cut."""
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(size)))


# Not tuned on a device yet. What the compiler says for sm_80 and sm_90 (python -m zoo.ops.core.compile_kernels gla): in
# float32, blocks of 64 x 64 spill up to 8 kB, of 32 x 32 nothing if these kernels have 8 warps; in bfloat16, 64 x 64
# fits in 4 but for the last kernel.
_FLOAT32_IN_8_WARPS = (gla_fwd_states_kernel, gla_bwd_states_kernel, gla_bwd_intra_kernel, gla_bwd_inputs_kernel)
_HALF_IN_8_WARPS = (gla_bwd_inputs_kernel,)


def _states(
    k: Tensor, v: Tensor, g: Tensor, state: Tensor, begin: Tensor, end: Tensor, offsets: Tensor, at: _Launch,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states before each chunk, (G, H, K, V) in `dtype`, and the last states, (N, H, K, V) float32."""
    N, H, _, _ = state.shape
    states, last = state.new_empty(begin.shape[0], *state.shape[1:], dtype=dtype), torch.empty_like(state)
    at.run(gla_fwd_states_kernel, (N * H, at.n_k, at.n_v), k, v, g, state, states, last, begin, end, offsets)
    return states, last


def _weights(q: Tensor, k: Tensor, g: Tensor, begin: Tensor, end: Tensor, scale: float, at: _Launch) -> Tensor:
    """P, (B, T, H, CHUNK) in the dtype of q; entries after the row's block of SUB tokens are not written."""
    P = q.new_empty(*q.shape[:3], CHUNK)
    at.run(gla_fwd_weights_kernel, (begin.shape[0], CHUNK // SUB, q.shape[2]), q, k, g, P, begin, end, scale)
    return P


@torch.library.custom_op("zoo::gla_fwd", mutates_args=())
@dispatch.on_its_device
def gla_fwd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, begin: Tensor, end: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q k g (B, T, H, K), v (B, T, H, V), state (N, H, K, V) float32, a ChunkTable of CHUNK -> o, the last states."""
    q, k, v, g, state = (x.contiguous() for x in (q, k, v, g, state))
    n, (_, _, H, K) = begin.shape[0], q.shape
    at = _Launch.of(H, K, v.shape[3], q.dtype)
    states, last = _states(k, v, g, state, begin, end, offsets, at, q.dtype)
    P, o = _weights(q, k, g, begin, end, scale, at), torch.empty_like(v)
    at.run(gla_fwd_out_kernel, (n, at.n_v, H), q, v, g, states, P, o, begin, end, scale)
    return o, last


@gla_fwd.register_fake
def _(q, k, v, g, state, begin, end, offsets, scale):
    return v.new_empty(v.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::gla_bwd", mutates_args=())
@dispatch.on_its_device
def gla_bwd(
    do: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and state. Chunk states and weights are computed again, the states in float32."""
    do, dlast, q, k, v, g, state = (x.contiguous() for x in (do, dlast, q, k, v, g, state))
    n, (_, _, H, K) = begin.shape[0], q.shape
    at = _Launch.of(H, K, v.shape[3], q.dtype)
    dstates, dstate = state.new_empty(n, *state.shape[1:]), torch.empty_like(state)
    at.run(
        gla_bwd_states_kernel, (state.shape[0] * H, at.n_k, at.n_v),
        q, do, g, dlast, dstates, dstate, begin, end, offsets, scale,
    )  # fmt: skip
    P, dv = _weights(q, k, g, begin, end, scale, at), torch.empty_like(v)
    at.run(gla_bwd_values_kernel, (n, at.n_v, H), k, g, do, P, dstates, dv, begin, end)
    del P  # as large as CHUNK / K of q
    dP = q.new_empty(*q.shape[:3], CHUNK, dtype=torch.float32)
    at.run(gla_bwd_weights_kernel, (n, H), do, v, dP, begin, end, scale)
    parts = [torch.empty_like(q, dtype=torch.float32) for _ in range(3)]  # of dq, dk and db
    at.run(gla_bwd_intra_kernel, (n, CHUNK // SUB * at.n_k, H), q, k, g, dP, *parts, begin, end)
    del dP
    states, _ = _states(k, v, g, state, begin, end, offsets, at, torch.float32)
    dq, dk, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
    at.run(
        gla_bwd_inputs_kernel, (n, at.n_k, H),
        q, k, v, g, do, states, dstates, *parts, dq, dk, dg, begin, end, scale,
    )  # fmt: skip
    return dq, dk, dv, dg, dstate


@gla_bwd.register_fake
def _(do, dlast, q, k, v, g, state, begin, end, offsets, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, state))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


@first_order("gated_linear_attention")
def _backward(ctx, do, dlast):
    return *gla_bwd(do, dlast, *ctx.saved_tensors, ctx.scale), None, None, None, None


gla_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.gla_fwd)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Reading and writing the states, and both products with the lower triangle of P."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    return B * T * H * (4 * K * V + CHUNK * (K + V))


@register_flop_formula(torch.ops.zoo.gla_bwd)
def _flops_bwd(do_shape, dlast_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Twice the forward's products, and the forward's states and weights again."""
    (B, T, H, K), V = q_shape, v_shape[-1]
    return B * T * H * (10 * K * V + CHUNK * (3 * K + 2 * V))


def compile_cases() -> list[KernelCase]:
    """Heads of the published models (K / V 128 / 256 and 256 / 512) and of the tiny one."""
    float32 = ("state", "states", "last", "dlast", "dstates", "dstate", "dp", "part_dq", "part_dk", "part_db", "db")
    cases = []
    for K, V, dtype, name in (
        (128, 256, torch.bfloat16, "bf16"),
        (256, 512, torch.bfloat16, "bf16"),
        (128, 256, torch.float32, "fp32"),
        (32, 32, torch.float32, "fp32"),
        (32, 32, torch.bfloat16, "bf16"),
    ):
        types = {f"{x}_ptr": f"*{name}" for x in ("q", "k", "v", "o", "do", "p", "dq", "dk", "dv")}
        types |= {f"{x}_ptr": "*i64" for x in ("begin", "end", "offsets")} | {"scale": "fp32"}
        types |= {f"{x}_ptr": "*fp32" for x in ("g", "dg", *float32)}  # gates in float32, as the layer makes them
        for kernel, own in (
            (gla_fwd_states_kernel, {"states_ptr": f"*{name}"}),
            (gla_fwd_states_kernel, {}),  # for the backward
            (gla_fwd_weights_kernel, {}),
            (gla_fwd_out_kernel, {"states_ptr": f"*{name}"}),
            (gla_bwd_states_kernel, {}),
            (gla_bwd_values_kernel, {}),
            (gla_bwd_weights_kernel, {}),
            (gla_bwd_intra_kernel, {"dq_ptr": "*fp32", "dk_ptr": "*fp32"}),
            (gla_bwd_inputs_kernel, {}),
        ):
            options = _Launch.of(4, K, V, dtype).options(kernel)
            launch = {x: options.pop(x) for x in ("num_warps", "num_stages")}
            signature = {x: t for x, t in (types | own).items() if x in kernel.arg_names}
            cases.append(KernelCase(kernel, signature, options, **launch, label=f"{name} K={K} V={V}"))
    return cases
