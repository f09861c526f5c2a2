"""Triton kernels of state space duality, forward and backward, by chunks of CHUNK tokens; equations as in `chunked.py`.

Forward: `scores` (C B^T, once for all heads of a group) and `increments` (what each chunk adds to its head's state) for
all chunks at once; `pass` (the states between chunks, one after the other); `output` (all chunks at once). The backward
computes scores and states again, then the gradient of the states by `increments` and `pass` against time, then for all
chunks at once `grad_scores`, `grad_groups` (dB and dC) and `grad_inputs` (dx, ddt, dA, dD).

With a_t = dt_t A, l its running sum inside a chunk and s = C B^T, the weights are s_ij exp(l_i - l_j) dt_j, i >= j. The
sums run in float64, on one number a token, so that their differences are exact behind a gate that shuts; what the gates
get from pairs i >= t > j is summed over these pairs alone, never as a difference of larger sums. What B and C get is
summed over the heads of a group in registers, HEADS of them a program, and over programs in a fixed order: no atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.decay_kernels import across, between, end_of, log_sums
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

CHUNK = 64
HEADS = 8  # of a group, in one program of the kernels that sum over heads
PASS_BLOCK = 1024  # elements of a state in one program of the sequential kernel


@triton.jit
def _steps(dt_ptr, A, o_t, m_t, H):
    """dt of a chunk and l, the running sums of dt A in float64; a missing step is the identity, dt = 0."""
    b_dt = tl.load(dt_ptr + o_t * H, mask=m_t, other=0.0).to(tl.float32)
    return b_dt, log_sums(b_dt * A)


@triton.jit
def _rows(ptr, o_t, m_t, o_d, H, D: tl.constexpr):
    """Rows o_t and columns o_d of a (T, H, D) tensor whose pointer stands at the chunk's first row."""
    return tl.load(ptr + o_t[:, None] * (H * D) + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def ssd_scores_kernel(
    B_ptr, C_ptr, s_ptr,  # (B*T, G, N) twice, (chunks, G, CHUNK, CHUNK) fp32
    begin_ptr, end_ptr, G, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C_i . B_j for i >= j, else 0."""
    i_c, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row = (begin * G + i_g) * N
    b_s = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_B = _rows(B_ptr + row, o_t, m_t, o_n, G, N)
        b_C = _rows(C_ptr + row, o_t, m_t, o_n, G, N)
        b_s += tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
    b_s = tl.where(o_t[:, None] >= o_t[None, :], b_s, 0.0)
    tl.store(s_ptr + (i_c * G + i_g) * (CHUNK * CHUNK) + o_t[:, None] * CHUNK + o_t[None, :], b_s)


@triton.jit
def ssd_increments_kernel(
    k_ptr, v_ptr, dt_ptr, A_ptr, own_ptr, total_ptr,  # (B*T, G, N), (B*T, H, P), (B*T, H), (H,); out, fp32:
    begin_ptr, end_ptr,  # (chunks, H, N, P), (chunks, H)
    H, G, N: tl.constexpr, P: tl.constexpr, WRITE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WRITE: what a chunk leaves behind, B^T (x dt e^{l_Q - l}); else what it asks of its state, C^T (dy e^l)."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n, i_p = tl.program_id(2) // tl.cdiv(P, BLOCK_P), tl.program_id(2) % tl.cdiv(P, BLOCK_P)
    o_n, o_p = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    A = tl.load(A_ptr + i_h).to(tl.float32)
    b_dt, b_l = _steps(dt_ptr + begin * H + i_h, A, o_t, m_t, H)
    total = end_of(b_l, o_t, CHUNK)
    b_w = b_dt * tl.exp((total - b_l).to(tl.float32)) if WRITE else tl.exp(b_l.to(tl.float32))
    k_ptr += (begin * G + i_h // (H // G)) * N
    m_k = (o_n < N)[:, None] & m_t[None, :]
    b_k = tl.load(k_ptr + o_t[None, :] * (G * N) + o_n[:, None], mask=m_k, other=0.0)  # [BLOCK_N, CHUNK]
    b_v = _rows(v_ptr + (begin * H + i_h) * P, o_t, m_t, o_p, H, P)
    b_s = tl.dot(b_k, (b_v * b_w[:, None]).to(b_k.dtype), input_precision=PRECISION)
    o_s = (i_c * H + i_h) * (N * P) + o_n[:, None] * P + o_p[None, :]
    tl.store(own_ptr + o_s, b_s, mask=(o_n < N)[:, None] & (o_p < P)[None, :])
    if tl.program_id(2) == 0:
        tl.store(total_ptr + i_c * H + i_h, total.to(tl.float32))


@triton.jit
def ssd_pass_kernel(
    own_ptr, total_ptr, first_ptr, last_ptr, between_ptr,  # (chunks, H, N, P), (chunks, H), (n, H, N, P) twice: fp32
    states_ptr, dtotal_ptr,  # backward only: between of the forward; (blocks, chunks, H) fp32: S dS, summed over BLOCK
    offsets_ptr, chunks, H, SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Along one document, or against time: what each chunk adds becomes the state that it meets, in `between`."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    i_block = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    first, last = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    b_s = tl.load(first_ptr + i_nh * SIZE + o_s, mask=m_s, other=0.0)
    for i in range(first, last):
        i_c = last - 1 - (i - first) if REVERSE else i
        row = i_c * H + i_h
        b_own = tl.load(own_ptr + row * SIZE + o_s, mask=m_s, other=0.0)
        tl.store(between_ptr + row * SIZE + o_s, b_s.to(between_ptr.dtype.element_ty), mask=m_s)
        decay = tl.exp(tl.load(total_ptr + row))
        if REVERSE:
            b_S = tl.load(states_ptr + row * SIZE + o_s, mask=m_s, other=0.0).to(tl.float32)
            tl.store(dtotal_ptr + i_block * chunks * H + row, decay * tl.sum(b_S * b_s, 0))
        b_s = b_s * decay + b_own
    tl.store(last_ptr + i_nh * SIZE + o_s, b_s, mask=m_s)


@triton.jit
def ssd_output_kernel(
    x_ptr, dt_ptr, A_ptr, C_ptr, D_ptr, s_ptr, states_ptr, y_ptr,  # the inputs; (chunks, G, CHUNK, CHUNK) fp32; states
    begin_ptr, end_ptr,
    H, G, N: tl.constexpr, P: tl.constexpr, HAS_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, head and block of P: by pairs inside the chunk, and from the state before it."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_g = i_h // (H // G)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row_x = (begin * H + i_h) * P
    A = tl.load(A_ptr + i_h).to(tl.float32)
    b_dt, b_l = _steps(dt_ptr + begin * H + i_h, A, o_t, m_t, H)
    b_y = tl.zeros([CHUNK, BLOCK_P], dtype=tl.float32)
    states_ptr += (i_c * H + i_h) * (N * P)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_C = _rows(C_ptr + (begin * G + i_g) * N, o_t, m_t, o_n, G, N)
        m_s = (o_n < N)[:, None] & (o_p < P)[None, :]
        b_S = tl.load(states_ptr + o_n[:, None] * P + o_p[None, :], mask=m_s, other=0.0)
        b_y += tl.dot(b_C, b_S.to(b_C.dtype), input_precision=PRECISION)
    b_y *= tl.exp(b_l.to(tl.float32))[:, None]
    b_x = _rows(x_ptr + row_x, o_t, m_t, o_p, H, P)
    s_ptr += (i_c * G + i_g) * (CHUNK * CHUNK)
    b_w = tl.load(s_ptr + o_t[:, None] * CHUNK + o_t[None, :]) * between(b_l, o_t, False) * b_dt[None, :]
    b_y += tl.dot(b_w.to(b_x.dtype), b_x, input_precision=PRECISION)
    if HAS_D:
        b_y += tl.load(D_ptr + i_h).to(tl.float32) * b_x
    m_y = m_t[:, None] & (o_p < P)[None, :]
    tl.store(y_ptr + row_x + o_t[:, None] * (H * P) + o_p[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def ssd_grad_scores_kernel(
    x_ptr, dt_ptr, A_ptr, dy_ptr, s_ptr,
    ds_ptr, da_ptr,  # (parts, chunks, G, CHUNK, CHUNK) fp32: sums over HEADS heads; (B*T, H) fp32: of dt A, from pairs
    begin_ptr, end_ptr, chunks,
    H, G, P: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk's scores, summed over HEADS heads, and that of dt A by pairs of tokens."""
    i_c, i_g, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    o_s = o_t[:, None] * CHUNK + o_t[None, :]
    x_ptr += begin * H * P
    dy_ptr += begin * H * P
    s_ptr += (i_c * G + i_g) * (CHUNK * CHUNK)
    R = H // G
    b_ds = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for r in range(i_part * HEADS, tl.minimum(i_part * HEADS + HEADS, R)):
        i_h = i_g * R + r
        A = tl.load(A_ptr + i_h).to(tl.float32)
        b_dt, b_l = _steps(dt_ptr + begin * H + i_h, A, o_t, m_t, H)
        b_dw = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        for p in range(0, P, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            b_dy = _rows(dy_ptr + i_h * P, o_t, m_t, o_p, H, P)
            b_x = _rows(x_ptr + i_h * P, o_t, m_t, o_p, H, P)
            b_dw += tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_dw *= between(b_l, o_t, False) * b_dt[None, :]
        b_ds += b_dw
        tl.store(da_ptr + begin * H + i_h + o_t * H, across(b_dw * tl.load(s_ptr + o_s), o_t), mask=m_t)
    tl.store(ds_ptr + ((i_part * chunks + i_c) * G + i_g) * (CHUNK * CHUNK) + o_s, b_ds)


@triton.jit
def ssd_grad_groups_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, dy_ptr, ds_ptr, states_ptr, dstates_ptr,
    dB_ptr, dC_ptr,  # (parts, B*T, G, N) fp32
    begin_ptr, end_ptr, chunks, tokens,
    H, G, N: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, N_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC of HEADS heads of a group: through the scores, and through the states."""
    i_c, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_part, i_n = tl.program_id(2) // N_BLOCKS, tl.program_id(2) % N_BLOCKS
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    x_ptr += begin * H * P
    dy_ptr += begin * H * P
    R = H // G
    row = (begin * G + i_g) * N
    b_B = _rows(B_ptr + row, o_t, m_t, o_n, G, N)
    b_C = _rows(C_ptr + row, o_t, m_t, o_n, G, N)
    dtype = b_B.dtype
    ds_ptr += ((i_part * chunks + i_c) * G + i_g) * (CHUNK * CHUNK)
    b_ds = tl.load(ds_ptr + o_t[:, None] * CHUNK + o_t[None, :])
    b_dC = tl.dot(b_ds.to(dtype), b_B, input_precision=PRECISION)
    b_ds = tl.load(ds_ptr + o_t[None, :] * CHUNK + o_t[:, None])
    b_dB = tl.dot(b_ds.to(dtype), b_C, input_precision=PRECISION)
    for r in range(i_part * HEADS, tl.minimum(i_part * HEADS + HEADS, R)):
        i_h = i_g * R + r
        A = tl.load(A_ptr + i_h).to(tl.float32)
        b_dt, b_l = _steps(dt_ptr + begin * H + i_h, A, o_t, m_t, H)
        b_before = tl.exp(b_l.to(tl.float32))[:, None]
        b_after = (b_dt * tl.exp((end_of(b_l, o_t, CHUNK) - b_l).to(tl.float32)))[:, None]
        here = (i_c * H + i_h) * (N * P)
        for p in range(0, P, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            o_s, m_s = o_p[:, None] + o_n[None, :] * P, (o_p < P)[:, None] & (o_n < N)[None, :]
            b_dy = (_rows(dy_ptr + i_h * P, o_t, m_t, o_p, H, P) * b_before).to(dtype)
            b_S = tl.load(states_ptr + here + o_s, mask=m_s, other=0.0)  # [BLOCK_P, BLOCK_N], read transposed
            b_dC += tl.dot(b_dy, b_S.to(dtype), input_precision=PRECISION)
            b_x = (_rows(x_ptr + i_h * P, o_t, m_t, o_p, H, P) * b_after).to(dtype)
            b_dS = tl.load(dstates_ptr + here + o_s, mask=m_s, other=0.0)
            b_dB += tl.dot(b_x, b_dS.to(dtype), input_precision=PRECISION)
    o_out = i_part.to(tl.int64) * tokens * G * N + row + o_t[:, None] * (G * N) + o_n[None, :]
    m_out = m_t[:, None] & (o_n < N)[None, :]
    tl.store(dB_ptr + o_out, b_dB, mask=m_out)
    tl.store(dC_ptr + o_out, b_dC, mask=m_out)


@triton.jit
def ssd_grad_inputs_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, s_ptr, states_ptr, dstates_ptr, dtotal_ptr, da_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dD_ptr,  # like x and dt; (chunks, H) fp32 twice: sums over a chunk
    begin_ptr, end_ptr,
    H, G, N: tl.constexpr, P: tl.constexpr, HAS_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, ddt, dA and dD; da holds what the gates got from pairs inside the chunk, the states give the rest."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_g = i_h // (H // G)
    begin = tl.load(begin_ptr + i_c)
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    row_x, row_b = (begin * H + i_h) * P, (begin * G + i_g) * N
    dt_ptr += begin * H + i_h
    A = tl.load(A_ptr + i_h).to(tl.float32)
    b_dt, b_l = _steps(dt_ptr, A, o_t, m_t, H)
    total = end_of(b_l, o_t, CHUNK)
    b_before, b_after = tl.exp(b_l.to(tl.float32)), tl.exp((total - b_l).to(tl.float32))
    s_ptr += (i_c * G + i_g) * (CHUNK * CHUNK)
    # transposed: rows j, columns i >= j
    b_w = (tl.load(s_ptr + o_t[None, :] * CHUNK + o_t[:, None]) * between(b_l, o_t, True)).to(x_ptr.dtype.element_ty)
    states_ptr += (i_c * H + i_h) * (N * P)
    dstates_ptr += (i_c * H + i_h) * (N * P)
    b_ddt = tl.zeros([CHUNK], dtype=tl.float32)
    b_ends = tl.zeros([CHUNK], dtype=tl.float32)  # of l_i, a summed up to i
    b_starts = tl.zeros([CHUNK], dtype=tl.float32)  # of l_Q - l_j, a summed after j
    b_dD = tl.zeros([CHUNK], dtype=tl.float32)
    for p in range(0, P, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_dy = _rows(dy_ptr + row_x, o_t, m_t, o_p, H, P)
        b_read = tl.zeros([CHUNK, BLOCK_P], dtype=tl.float32)  # C S
        b_given = tl.zeros([CHUNK, BLOCK_P], dtype=tl.float32)  # of dt x, through the state
        for n in range(0, N, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            o_s, m_s = o_n[:, None] * P + o_p[None, :], (o_n < N)[:, None] & (o_p < P)[None, :]
            b_S = tl.load(states_ptr + o_s, mask=m_s, other=0.0)
            b_dS = tl.load(dstates_ptr + o_s, mask=m_s, other=0.0)
            b_C = _rows(C_ptr + row_b, o_t, m_t, o_n, G, N)
            b_read += tl.dot(b_C, b_S.to(b_C.dtype), input_precision=PRECISION)
            b_B = _rows(B_ptr + row_b, o_t, m_t, o_n, G, N)
            b_given += tl.dot(b_B, b_dS.to(b_B.dtype), input_precision=PRECISION)
        b_given *= b_after[:, None]
        b_dz = b_given + tl.dot(b_w, b_dy, input_precision=PRECISION)
        b_dy = b_dy.to(tl.float32)
        b_x = _rows(x_ptr + row_x, o_t, m_t, o_p, H, P).to(tl.float32)
        b_ends += tl.sum(b_read * b_dy, 1)
        b_starts += tl.sum(b_given * b_x, 1)
        b_ddt += tl.sum(b_dz * b_x, 1)
        b_dx = b_dt[:, None] * b_dz
        if HAS_D:
            b_dx += tl.load(D_ptr + i_h).to(tl.float32) * b_dy
            b_dD += tl.sum(b_dy * b_x, 1)
        m_x = m_t[:, None] & (o_p < P)[None, :]
        tl.store(dx_ptr + row_x + o_t[:, None] * (H * P) + o_p[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    b_ends *= b_before
    b_starts *= b_dt
    b_da = tl.load(da_ptr + begin * H + i_h + o_t * H, mask=m_t, other=0.0)
    b_da += tl.load(dtotal_ptr + i_c * H + i_h)  # of l_Q
    # sums over the places i >= t and j < t, the latter not as a difference: the own place may be far larger
    b_da += tl.sum(tl.where(o_t[None, :] >= o_t[:, None], b_ends[None, :], 0.0), 1)
    b_da += tl.sum(tl.where(o_t[None, :] < o_t[:, None], b_starts[None, :], 0.0), 1)
    b_ddt += A * b_da
    tl.store(ddt_ptr + begin * H + i_h + o_t * H, b_ddt.to(ddt_ptr.dtype.element_ty), mask=m_t)
    tl.store(dA_ptr + i_c * H + i_h, tl.sum(b_da * b_dt, 0))
    if HAS_D:
        tl.store(dD_ptr + i_c * H + i_h, tl.sum(b_dD, 0))


class _Launch(NamedTuple):
    """What a launch needs beside its tensors, from the shapes and the dtype alone: one fixed choice, no tuning."""

    constants: dict[str, Any]
    n_blocks: int
    p_blocks: int
    parts: int  # of the heads of a group
    float32: bool

    @classmethod
    def of(cls, H: int, G: int, N: int, P: int, dtype: torch.dtype) -> "_Launch":
        block_n, block_p = _block(N, dtype), _block(P, dtype)
        n_blocks, p_blocks = triton.cdiv(N, block_n), triton.cdiv(P, block_p)
        # half precision has one way only
        precision = dispatch.EXACT_PRODUCTS if dtype == torch.float32 else "tf32"
        constants = {
            "H": H, "G": G, "N": N, "P": P, "SIZE": N * P, "CHUNK": CHUNK, "HEADS": HEADS, "BLOCK_N": block_n,
            "BLOCK_P": block_p, "N_BLOCKS": n_blocks, "BLOCK": PASS_BLOCK, "PRECISION": precision,
        }  # fmt: skip
        return cls(constants, n_blocks, p_blocks, triton.cdiv(H // G, HEADS), dtype == torch.float32)

    def options(self, kernel: Any, **flags: bool) -> dict[str, Any]:
        """The sizes and constants that the kernel names, and how many warps run it."""
        constants, launch = self.constants | flags, {"num_warps": 4, "num_stages": 2}
        if kernel in _GRADIENTS:
            launch["num_warps"] = 8
            constants["BLOCK_P"] = min(constants["BLOCK_P"], 16 if self.float32 else 32)
        return {name: constants[name] for name in kernel.arg_names if name in constants} | launch

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Tensor | int, **flags: bool) -> None:
        kernel[grid](*args, **self.options(kernel, **flags))


def _block(size: int, dtype: torch.dtype) -> int:
    """tl.dot wants at least 16 in every dimension: smaller heads are padded by masks, larger ones cut."""
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(size)))


# Not tuned on a device yet. What the compiler says for sm_80 and sm_90 (python -m zoo.ops.core.compile_kernels ssd):
# with these blocks nothing spills; with the others' blocks and 4 warps up to 1 kB does, in float32 and in bfloat16.
_GRADIENTS = (ssd_grad_scores_kernel, ssd_grad_groups_kernel, ssd_grad_inputs_kernel)


def _states(
    k: Tensor, v: Tensor, dt: Tensor, A: Tensor, first: Tensor, begin: Tensor, end: Tensor, offsets: Tensor,
    at: _Launch, states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward: the states before each chunk (chunks, H, N, P) in the dtype of v, and the last ones, (n, H, N, P).

    Backward, with the forward's states: the gradients of the states after each chunk, of the first ones, and of l_Q.
    """
    n, (documents, H, N, P) = begin.shape[0], first.shape
    own, total, last = first.new_empty(n, H, N, P), first.new_empty(n, H), torch.empty_like(first)
    between = own if v.dtype == own.dtype else torch.empty_like(own, dtype=v.dtype)
    grid = (n, H, at.n_blocks * at.p_blocks)
    at.run(ssd_increments_kernel, grid, k, v, dt, A, own, total, begin, end, WRITE=states is None)
    blocks = triton.cdiv(N * P, PASS_BLOCK)
    dtotal = total if states is None else total.new_empty(blocks, n, H)
    at.run(
        ssd_pass_kernel, (documents * H, blocks),
        own, total, first, last, between, own if states is None else states, dtotal, offsets, n,
        REVERSE=states is not None,
    )  # fmt: skip
    return between, last, total if states is None else dtotal.sum(0)


def _scores(B: Tensor, C: Tensor, begin: Tensor, end: Tensor, at: _Launch) -> Tensor:
    """(chunks, G, CHUNK, CHUNK) float32."""
    n, G = begin.shape[0], B.shape[2]
    s = torch.empty(n, G, CHUNK, CHUNK, dtype=torch.float32, device=B.device)
    at.run(ssd_scores_kernel, (n, G), B, C, s, begin, end)
    return s


@torch.library.custom_op("zoo::ssd_fwd", mutates_args=())
@dispatch.on_its_device
def ssd_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B, T, H, P), dt (B, T, H), A D (H,), B C (B, T, G, N), state (n, H, N, P) float32, a ChunkTable of CHUNK."""
    x, dt, A, B, C, state = (z.contiguous() for z in (x, dt, A, B, C, state))
    (H, P), (G, N) = x.shape[2:], B.shape[2:]
    at = _Launch.of(H, G, N, P, x.dtype)
    states, last, _ = _states(B, x, dt, A, state, begin, end, offsets, at)
    s, y = _scores(B, C, begin, end, at), torch.empty_like(x)
    at.run(
        ssd_output_kernel, (begin.shape[0], H, at.p_blocks),
        x, dt, A, C, A if D is None else D.contiguous(), s, states, y, begin, end, HAS_D=D is not None,
    )  # fmt: skip
    return y, last


@ssd_fwd.register_fake
def _(x, dt, A, B, C, D, state, begin, end, offsets):
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("zoo::ssd_bwd", mutates_args=())
@dispatch.on_its_device
def ssd_bwd(
    dy: Tensor, dlast: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D (zeros (H,) without one) and state; scores and states are computed again."""
    dy, dlast, x, dt, A, B, C, state = (z.contiguous() for z in (dy, dlast, x, dt, A, B, C, state))
    n, (batch, T, H, P), (G, N) = begin.shape[0], x.shape, B.shape[2:]
    at, flag = _Launch.of(H, G, N, P, x.dtype), {"HAS_D": D is not None}
    states, _, _ = _states(B, x, dt, A, state, begin, end, offsets, at)
    dstates, dstate, dtotal = _states(C, dy, dt, A, dlast, begin, end, offsets, at, states)
    s = _scores(B, C, begin, end, at)
    ds, da = s.new_empty(at.parts, *s.shape), s.new_empty(batch, T, H)
    at.run(ssd_grad_scores_kernel, (n, G, at.parts), x, dt, A, dy, s, ds, da, begin, end, n)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dA, dD = s.new_empty(n, H), s.new_zeros(n, H) if D is None else s.new_empty(n, H)
    at.run(
        ssd_grad_inputs_kernel, (n, H),
        x, dt, A, B, C, A if D is None else D.contiguous(), dy, s, states, dstates, dtotal, da, dx, ddt,
        dA, dD, begin, end, **flag,
    )  # fmt: skip
    del s, da
    dB, dC = (ds.new_empty(at.parts, *z.shape) for z in (B, C))
    at.run(
        ssd_grad_groups_kernel, (n, G, at.parts * at.n_blocks),
        x, dt, A, B, C, dy, ds, states, dstates, dB, dC, begin, end, n, batch * T,
    )  # fmt: skip
    return (
        dx, ddt, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
        dD.sum(0).to(A.dtype if D is None else D.dtype), dstate,
    )  # fmt: skip


@ssd_bwd.register_fake
def _(dy, dlast, x, dt, A, B, C, D, state, begin, end, offsets):
    dD = A.new_empty(A.shape) if D is None else D.new_empty(D.shape)
    return *(z.new_empty(z.shape) for z in (x, dt, A, B, C)), dD, state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@first_order("ssd")
def _backward(ctx, dy, dlast):
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    *grads, dD, dstate = ssd_bwd(dy, dlast, *saved)
    return *grads, None if saved[5] is None else dD, dstate, None, None, None


ssd_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.ssd_fwd)
def _flops(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """Writing and reading the states; the lower triangles of the scores, one a group, and of the weights."""
    (batch, T, H, P), (G, N) = x_shape, B_shape[2:]
    return batch * T * (H * (4 * N * P + CHUNK * P) + G * CHUNK * N)


@register_flop_formula(torch.ops.zoo.ssd_bwd)
def _flops_bwd(dy_shape, dlast_shape, x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """Twice the forward's products, and the forward's states and scores again, and C S for the gates."""
    (batch, T, H, P), (G, N) = x_shape, B_shape[2:]
    return batch * T * (H * (12 * N * P + 2 * CHUNK * P) + G * 3 * CHUNK * N)


def compile_cases() -> list[KernelCase]:
    """Mamba-2: N = 128, P = 64 at every published size; N = 64, P = 32 for tiny; two sizes of the proofs.

    dt, A and D are float32, as the layer makes them.
    """
    cases = []
    for N, P, dtype, name in (
        (128, 64, torch.bfloat16, "bf16"),
        (128, 64, torch.float32, "fp32"),
        (64, 32, torch.bfloat16, "bf16"),
        (64, 32, torch.float32, "fp32"),
        (16, 8, torch.float32, "fp32"),
        (9, 20, torch.float32, "fp32"),
    ):
        types = {
            f"{z}_ptr": f"*{name}" for z in ("x", "B", "C", "y", "dy", "dx", "k", "v", "states", "dstates", "between")
        }
        types |= {f"{z}_ptr": "*i64" for z in ("begin", "end", "offsets")}
        types |= dict.fromkeys(("H", "G", "chunks", "tokens"), "i32")
        for kernel, flags in (
            (ssd_scores_kernel, {}),
            (ssd_increments_kernel, {"WRITE": True}),
            (ssd_increments_kernel, {"WRITE": False}),
            (ssd_pass_kernel, {"REVERSE": False}),
            (ssd_pass_kernel, {"REVERSE": True}),
            (ssd_output_kernel, {"HAS_D": True}),
            (ssd_grad_scores_kernel, {}),
            (ssd_grad_groups_kernel, {}),
            (ssd_grad_inputs_kernel, {"HAS_D": True}),
        ):
            options = _Launch.of(24, 1, N, P, dtype).options(kernel, **flags)
            launch = {z: options.pop(z) for z in ("num_warps", "num_stages")}
            constants = {z: value for z, value in options.items() if z not in types}
            spills = 8 if kernel is ssd_grad_groups_kernel and N == 16 else 0  # on sm_80; no model is so small
            signature = {z: types.get(z, "*fp32") for z in kernel.arg_names if z not in constants}
            label = f"{name} N={N} P={P}"
            cases.append(KernelCase(kernel, signature, constants, **launch, spills=spills, label=label))
    return cases
