"""Triton kernels of ParaGRU: cell, Jacobian, scan and Newton's loop in one, forward; one transposed scan, backward.

A program takes some channels of one sequence and goes along it in windows of WINDOW steps. A window is solved by
Newton's method from the state that the one before left, until a correction is small; nothing is asked of the host. The
iterates are clamped to what the cell's states cannot pass. A window that LIMIT corrections do not solve is walked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase
from zoo.ops.scans.newton_scan.in_kernels import (
    ENOUGH,
    LIMIT,
    WARPS,
    WINDOW,
    block_of,
    cases,
    earlier,
    later,
    offsets_of,
    row,
    size_of,
    tanh,
    then,
)


@triton.jit
def _gates(p, u_z, u_r, u_c, a_z, a_r, a_c):
    z = tl.sigmoid(a_z * p + u_z)
    r = tl.sigmoid(a_r * p + u_r)
    return z, r, tanh(a_c * (r * p) + u_c)


@triton.jit
def _slopes(p, z, r, c, a_z, a_r, a_c):
    """The derivatives of the new state by u_z, u_r, u_c, and by the state before."""
    by_z = (c - p) * z * (1.0 - z)
    by_c = z * (1.0 - c * c)
    by_r = by_c * a_c * p * r * (1.0 - r)
    return by_z, by_r, by_c, 1.0 - z + by_z * a_z + by_r * a_r + by_c * a_c * r


@triton.jit
def _load_gates(u_ptr, D, mask):
    u_z = tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32)
    u_r = tl.load(u_ptr + D, mask=mask, other=0.0).to(tl.float32)
    u_c = tl.load(u_ptr + 2 * D, mask=mask, other=0.0).to(tl.float32)
    return u_z, u_r, u_c


@triton.jit
def para_gru_fwd_kernel(
    u_ptr, a_ptr, keep_ptr, state_ptr, h_ptr, last_ptr,  # (B*T, 3, D), (3, D), (B*T,), (N, D), (B*T, D), (N, D), fp32
    offsets_ptr, D, HAS_KEEP: tl.constexpr, ENOUGH: tl.constexpr, LIMIT: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All states of one sequence and one block of channels, by Newton's method in windows."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(offsets_ptr + i_n)
    length = (tl.load(offsets_ptr + i_n + 1) - begin).to(tl.int32)
    a_z, a_r, a_c = _load_gates(a_ptr + o_d, D, m_d)
    left = tl.load(state_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    u_ptr += begin * 3 * D + o_d
    h_ptr += begin * D + o_d
    keep_ptr += begin
    o_t = tl.arange(0, WINDOW)
    for start in range(0, length, WINDOW):
        count = tl.minimum(length - start, WINDOW)
        m_t = (o_t < count)[:, None] & m_d[None, :]
        u_z, u_r, u_c = _load_gates(u_ptr + o_t[:, None] * 3 * D + tl.zeros([1, BLOCK_D], dtype=tl.int32), D, m_t)
        b_keep = tl.full([WINDOW], 1.0, dtype=tl.float32)
        if HAS_KEEP:
            b_keep = tl.load(keep_ptr + o_t, mask=o_t < count, other=0.0)
        bound = tl.maximum(tl.abs(left), 1.0)[None, :]
        b_h = tl.sigmoid(u_z) * tanh(u_c)
        size = tl.max(left * 0.0, 0) + float("inf")
        made = 0
        while (made < LIMIT) & (size > ENOUGH):
            b_p = later(b_h, left, WINDOW, BLOCK_D) * b_keep[:, None]
            z, r, c = _gates(b_p, u_z, u_r, u_c, a_z[None, :], a_r[None, :], a_c[None, :])
            _, _, _, b_J = _slopes(b_p, z, r, c, a_z[None, :], a_r[None, :], a_c[None, :])
            b_d = tl.where(m_t, b_p + z * (c - b_p) - b_h, 0.0)
            _, b_d = tl.associative_scan((b_J * b_keep[:, None], b_d), 0, then)
            b_h = tl.minimum(tl.maximum(b_h + b_d, -bound), bound)
            size = size_of(b_d)
            made += 1
        if size <= ENOUGH:
            tl.store(h_ptr + o_t[:, None] * D + tl.zeros([1, BLOCK_D], dtype=tl.int32), b_h, mask=m_t)
            left = row(b_h, count - 1, WINDOW)
        else:
            for t in range(count):
                v_z, v_r, v_c = _load_gates(u_ptr + t * 3 * D, D, m_d)
                if HAS_KEEP:
                    left = left * tl.load(keep_ptr + t)
                z, _, c = _gates(left, v_z, v_r, v_c, a_z, a_r, a_c)
                left = left + z * (c - left)
                tl.store(h_ptr + t * D, left, mask=m_d)
        u_ptr += WINDOW * 3 * D
        h_ptr += WINDOW * D
        keep_ptr += WINDOW
    tl.store(last_ptr + i_n * D + o_d, left, mask=m_d)


@triton.jit
def para_gru_bwd_kernel(
    u_ptr, a_ptr, keep_ptr, state_ptr, h_ptr,  # (B*T, 3, D), (3, D), (B*T,), (N, D), (B*T, D), fp32
    dh_ptr, dlast_ptr, du_ptr, da_ptr, dstate_ptr,  # (B*T, D), (N, D), (B*T, 3, D), (N, 3, D), (N, D), fp32
    offsets_ptr, D, HAS_KEEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`right` is what the steps after a window send back to its last state."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(offsets_ptr + i_n)
    length = (tl.load(offsets_ptr + i_n + 1) - begin).to(tl.int32)
    a_z, a_r, a_c = _load_gates(a_ptr + o_d, D, m_d)
    right = tl.load(dlast_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    state = tl.load(state_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    da_z = tl.zeros([BLOCK_D], dtype=tl.float32)
    da_r = tl.zeros([BLOCK_D], dtype=tl.float32)
    da_c = tl.zeros([BLOCK_D], dtype=tl.float32)
    o_t = tl.arange(0, WINDOW)
    windows = tl.cdiv(length, WINDOW)
    for i in range(windows):
        start = (windows - 1 - i) * WINDOW
        o_s = start + o_t
        m_t = (o_s < length)[:, None] & m_d[None, :]
        at = (begin + o_s)[:, None] * D + o_d[None, :]
        at_u = (begin + o_s)[:, None] * 3 * D + o_d[None, :]
        u_z, u_r, u_c = _load_gates(u_ptr + at_u, D, m_t)
        b_p = tl.load(h_ptr + at - D, mask=m_t & (o_s > 0)[:, None], other=0.0)
        b_p = tl.where((o_s == 0)[:, None], state[None, :], b_p)
        b_keep = tl.full([WINDOW], 1.0, dtype=tl.float32)
        if HAS_KEEP:
            b_keep = tl.load(keep_ptr + begin + o_s, mask=o_s < length, other=1.0)
        b_p = b_p * b_keep[:, None]
        z, r, c = _gates(b_p, u_z, u_r, u_c, a_z[None, :], a_r[None, :], a_c[None, :])
        by_z, by_r, by_c, b_J = _slopes(b_p, z, r, c, a_z[None, :], a_r[None, :], a_c[None, :])
        b_J = tl.where(m_t, b_J * b_keep[:, None], 1.0)  # after the end: hands on what comes
        b_g = tl.load(dh_ptr + at, mask=m_t, other=0.0)
        b_P, b_s = tl.associative_scan((b_J, b_J * b_g), 0, then, reverse=True)
        b_s += b_P * right[None, :]  # what each step sends back to the one before
        b_mu = b_g + earlier(b_s, right, WINDOW, BLOCK_D)
        right = row(b_s, 0, WINDOW)
        d_z = tl.where(m_t, b_mu * by_z, 0.0)
        d_r = tl.where(m_t, b_mu * by_r, 0.0)
        d_c = tl.where(m_t, b_mu * by_c, 0.0)
        tl.store(du_ptr + at_u, d_z.to(du_ptr.dtype.element_ty), mask=m_t)
        tl.store(du_ptr + at_u + D, d_r.to(du_ptr.dtype.element_ty), mask=m_t)
        tl.store(du_ptr + at_u + 2 * D, d_c.to(du_ptr.dtype.element_ty), mask=m_t)
        da_z += tl.sum(d_z * b_p, 0)
        da_r += tl.sum(d_r * b_p, 0)
        da_c += tl.sum(d_c * r * b_p, 0)
    tl.store(da_ptr + i_n * 3 * D + o_d, da_z, mask=m_d)
    tl.store(da_ptr + i_n * 3 * D + D + o_d, da_r, mask=m_d)
    tl.store(da_ptr + i_n * 3 * D + 2 * D + o_d, da_c, mask=m_d)
    tl.store(dstate_ptr + i_n * D + o_d, right, mask=m_d)


def run(
    u: Tensor, a: Tensor, state: Tensor, keep: Tensor | None, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, D), a (3, D), state (N, D), keep (B, T, 1) or None: all states in u's dtype, and the last ones."""
    B, T = u.shape[:2]
    offsets = offsets_of(B, T, cuts, u.device)
    h, last = para_gru_fwd(u, a.float(), None if keep is None else keep.reshape(B, T), state, offsets)
    return h.to(u.dtype), last


@torch.library.custom_op("zoo::para_gru_fwd", mutates_args=())
@dispatch.on_its_device
def para_gru_fwd(
    u: Tensor, a: Tensor, keep: Tensor | None, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All states (B, T, D) and the last ones (N, D), float32; the documents lie between the offsets (N + 1,)."""
    u, a, state = u.contiguous(), a.contiguous(), state.contiguous()
    B, T, _, D = u.shape
    h, last = state.new_empty(B, T, D), torch.empty_like(state)
    para_gru_fwd_kernel[state.shape[0], triton.cdiv(D, block_of(D))](
        u, a, a if keep is None else keep.contiguous(), state, h, last, offsets, D, HAS_KEEP=keep is not None,
        ENOUGH=ENOUGH, LIMIT=LIMIT, WINDOW=WINDOW, BLOCK_D=block_of(D), num_warps=WARPS,
    )  # fmt: skip
    return h, last


@para_gru_fwd.register_fake
def _(u, a, keep, state, offsets):
    B, T, _, D = u.shape
    return state.new_empty(B, T, D), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::para_gru_bwd", mutates_args=())
@dispatch.on_its_device
def para_gru_bwd(
    dh: Tensor, dlast: Tensor, u: Tensor, a: Tensor, keep: Tensor | None, state: Tensor, h: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, a and state."""
    dh, dlast, u, a, state = (x.contiguous() for x in (dh, dlast, u, a, state))
    N, D = state.shape
    du, da, dstate = torch.empty_like(u), state.new_empty(N, 3, D), torch.empty_like(state)
    para_gru_bwd_kernel[N, triton.cdiv(D, block_of(D))](
        u, a, a if keep is None else keep.contiguous(), state, h, dh, dlast, du, da, dstate, offsets, D,
        HAS_KEEP=keep is not None, WINDOW=WINDOW, BLOCK_D=block_of(D), num_warps=WARPS,
    )  # fmt: skip
    return du, da.sum(0), dstate


@para_gru_bwd.register_fake
def _(dh, dlast, u, a, keep, state, h, offsets):
    return u.new_empty(u.shape), a.new_empty(a.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    u, a, keep, state, offsets = inputs
    ctx.save_for_backward(u, a, keep, state, output[0], offsets)


@first_order("para_gru")
def _backward(ctx, dh, dlast):
    du, da, dstate = para_gru_bwd(dh, dlast, *ctx.saved_tensors)
    return du, da, None, dstate, None


para_gru_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.para_gru_fwd)
def _flops(u_shape, *args, out_shape=None, **kwargs) -> int:
    """Four corrections of gates, slopes and a scan of six levels."""
    B, T, _, D = u_shape
    return 4 * (45 + 4 * 6) * B * T * D


@register_flop_formula(torch.ops.zoo.para_gru_bwd)
def _flops_bwd(dh_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D = dh_shape
    return (55 + 4 * 6) * B * T * D


def compile_cases() -> list[KernelCase]:
    """Of both kernels. sm_80 keeps to 168 registers, for a third block on a multiprocessor, and spills 8 bytes."""
    return cases((para_gru_fwd_kernel, para_gru_bwd_kernel), {}, spills=8)
