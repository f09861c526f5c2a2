"""Triton kernels of ParaLSTM: as ParaGRU's, with a 2x2 block for each channel and step.

States and gradients of states are two planes, c and h, that lie `plane` numbers apart.
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
    then_blocks,
)


@triton.jit
def _gates(c0, h0, u_f, u_o, u_z, a_f, a_o, a_z, p_f, p_o):
    """f, z, the new c, o and tanh(c)."""
    f = tl.sigmoid(a_f * h0 + p_f * c0 + u_f)
    z = tanh(a_z * h0 + u_z)
    c = f * c0 + (1.0 - f) * z
    return f, z, c, tl.sigmoid(a_o * h0 + p_o * c + u_o), tanh(c)


@triton.jit
def _slopes(c0, f, z, o, tanh_c, p_o):
    """The derivatives of the new c by u_f and u_z, and of the new h by u_o and by c, its peephole included."""
    h_by_o = tanh_c * o * (1.0 - o)
    return (c0 - z) * f * (1.0 - f), (1.0 - f) * (1.0 - z * z), h_by_o, o * (1.0 - tanh_c * tanh_c) + h_by_o * p_o


@triton.jit
def _blocks(f, c_by_f, c_by_z, h_by_o, h_by_c, a_f, a_o, a_z, p_f):
    """The Jacobian [[cc, ch], [hc, hh]]."""
    cc = f + c_by_f * p_f
    ch = c_by_f * a_f + c_by_z * a_z
    return cc, ch, h_by_c * cc, h_by_o * a_o + h_by_c * ch


@triton.jit
def _three(u_ptr, D, mask):
    x = tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(u_ptr + D, mask=mask, other=0.0).to(tl.float32)
    return x, y, tl.load(u_ptr + 2 * D, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def para_lstm_fwd_kernel(
    u_ptr, a_ptr, p_ptr, keep_ptr, state_ptr,  # (B*T, 3, D), (3, D), (2, D), (B*T,), (2, N, D)
    s_ptr, last_ptr,  # (2, B*T, D), (2, N, D), fp32
    offsets_ptr, plane, plane_n, D, HAS_KEEP: tl.constexpr, ENOUGH: tl.constexpr, LIMIT: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All states (c, h) of one sequence and one block of channels, by Newton's method in windows."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_n * 0  # int64, whatever the launcher made of it
    plane_n += i_n * 0
    begin = tl.load(offsets_ptr + i_n)
    length = (tl.load(offsets_ptr + i_n + 1) - begin).to(tl.int32)
    a_f, a_o, a_z = _three(a_ptr + o_d, D, m_d)
    p_f = tl.load(p_ptr + o_d, mask=m_d, other=0.0)
    p_o = tl.load(p_ptr + D + o_d, mask=m_d, other=0.0)
    c_left = tl.load(state_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    h_left = tl.load(state_ptr + plane_n + i_n * D + o_d, mask=m_d, other=0.0)
    u_ptr += begin * 3 * D + o_d
    s_ptr += begin * D + o_d
    keep_ptr += begin
    o_t = tl.arange(0, WINDOW)
    zero = tl.zeros([1, BLOCK_D], dtype=tl.int32)
    for start in range(0, length, WINDOW):
        count = tl.minimum(length - start, WINDOW)
        m_t = (o_t < count)[:, None] & m_d[None, :]
        u_f, u_o, u_z = _three(u_ptr + o_t[:, None] * 3 * D + zero, D, m_t)
        b_keep = tl.full([WINDOW], 1.0, dtype=tl.float32)
        if HAS_KEEP:
            b_keep = tl.load(keep_ptr + o_t, mask=o_t < count, other=0.0)
        bound = tl.maximum(tl.maximum(tl.abs(c_left), tl.abs(h_left)), 1.0)[None, :]
        b_c = (1.0 - tl.sigmoid(u_f)) * tanh(u_z)
        b_h = tl.sigmoid(p_o[None, :] * b_c + u_o) * tanh(b_c)
        size = tl.max(c_left * 0.0, 0) + float("inf")
        made = 0
        while (made < LIMIT) & (size > ENOUGH):
            c0 = later(b_c, c_left, WINDOW, BLOCK_D) * b_keep[:, None]
            h0 = later(b_h, h_left, WINDOW, BLOCK_D) * b_keep[:, None]
            f, z, c, o, tanh_c = _gates(
                c0, h0, u_f, u_o, u_z, a_f[None, :], a_o[None, :], a_z[None, :], p_f[None, :], p_o[None, :]
            )
            c_by_f, c_by_z, h_by_o, h_by_c = _slopes(c0, f, z, o, tanh_c, p_o[None, :])
            cc, ch, hc, hh = _blocks(
                f, c_by_f, c_by_z, h_by_o, h_by_c, a_f[None, :], a_o[None, :], a_z[None, :], p_f[None, :]
            )
            d_c = tl.where(m_t, c - b_c, 0.0)
            d_h = tl.where(m_t, o * tanh_c - b_h, 0.0)
            k = b_keep[:, None]
            _, _, _, _, d_c, d_h = tl.associative_scan((cc * k, ch * k, hc * k, hh * k, d_c, d_h), 0, then_blocks)
            b_c = tl.minimum(tl.maximum(b_c + d_c, -bound), bound)
            b_h = tl.minimum(tl.maximum(b_h + d_h, -bound), bound)
            size = tl.maximum(size_of(d_c), size_of(d_h))
            made += 1
        if size <= ENOUGH:
            tl.store(s_ptr + o_t[:, None] * D + zero, b_c, mask=m_t)
            tl.store(s_ptr + plane + o_t[:, None] * D + zero, b_h, mask=m_t)
            c_left = row(b_c, count - 1, WINDOW)
            h_left = row(b_h, count - 1, WINDOW)
        else:
            for t in range(count):
                v_f, v_o, v_z = _three(u_ptr + t * 3 * D, D, m_d)
                if HAS_KEEP:
                    c_left = c_left * tl.load(keep_ptr + t)
                    h_left = h_left * tl.load(keep_ptr + t)
                _, _, c_new, o, tanh_c = _gates(c_left, h_left, v_f, v_o, v_z, a_f, a_o, a_z, p_f, p_o)
                c_left = c_new
                h_left = o * tanh_c
                tl.store(s_ptr + t * D, c_left, mask=m_d)
                tl.store(s_ptr + plane + t * D, h_left, mask=m_d)
        u_ptr += WINDOW * 3 * D
        s_ptr += WINDOW * D
        keep_ptr += WINDOW
    tl.store(last_ptr + i_n * D + o_d, c_left, mask=m_d)
    tl.store(last_ptr + plane_n + i_n * D + o_d, h_left, mask=m_d)


@triton.jit
def para_lstm_bwd_kernel(
    u_ptr, a_ptr, p_ptr, keep_ptr, state_ptr, s_ptr,  # (B*T, 3, D), (3, D), (2, D), (B*T,), (2, N, D), (2, B*T, D)
    dh_ptr, dlast_ptr, du_ptr, dw_ptr, dstate_ptr,  # (B*T, D), (2, N, D), (B*T, 3, D), (N, 5, D), (2, N, D), fp32
    offsets_ptr, plane, plane_n, D, HAS_KEEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the steps after a window send back to its last c and h comes from the right."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_n * 0
    plane_n += i_n * 0
    begin = tl.load(offsets_ptr + i_n)
    length = (tl.load(offsets_ptr + i_n + 1) - begin).to(tl.int32)
    a_f, a_o, a_z = _three(a_ptr + o_d, D, m_d)
    p_f = tl.load(p_ptr + o_d, mask=m_d, other=0.0)
    p_o = tl.load(p_ptr + D + o_d, mask=m_d, other=0.0)
    c_right = tl.load(dlast_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    h_right = tl.load(dlast_ptr + plane_n + i_n * D + o_d, mask=m_d, other=0.0)
    c_start = tl.load(state_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    h_start = tl.load(state_ptr + plane_n + i_n * D + o_d, mask=m_d, other=0.0)
    da_f = tl.zeros([BLOCK_D], dtype=tl.float32)
    da_o = tl.zeros([BLOCK_D], dtype=tl.float32)
    da_z = tl.zeros([BLOCK_D], dtype=tl.float32)
    dp_f = tl.zeros([BLOCK_D], dtype=tl.float32)
    dp_o = tl.zeros([BLOCK_D], dtype=tl.float32)
    o_t = tl.arange(0, WINDOW)
    windows = tl.cdiv(length, WINDOW)
    for i in range(windows):
        o_s = (windows - 1 - i) * WINDOW + o_t
        m_t = (o_s < length)[:, None] & m_d[None, :]
        at = (begin + o_s)[:, None] * D + o_d[None, :]
        at_u = (begin + o_s)[:, None] * 3 * D + o_d[None, :]
        u_f, u_o, u_z = _three(u_ptr + at_u, D, m_t)
        m_p = m_t & (o_s > 0)[:, None]
        c0 = tl.load(s_ptr + at - D, mask=m_p, other=0.0)
        h0 = tl.load(s_ptr + plane + at - D, mask=m_p, other=0.0)
        c0 = tl.where((o_s == 0)[:, None], c_start[None, :], c0)
        h0 = tl.where((o_s == 0)[:, None], h_start[None, :], h0)
        b_keep = tl.full([WINDOW], 1.0, dtype=tl.float32)
        if HAS_KEEP:
            b_keep = tl.load(keep_ptr + begin + o_s, mask=o_s < length, other=1.0)
        c0 = c0 * b_keep[:, None]
        h0 = h0 * b_keep[:, None]
        f, z, c, o, tanh_c = _gates(
            c0, h0, u_f, u_o, u_z, a_f[None, :], a_o[None, :], a_z[None, :], p_f[None, :], p_o[None, :]
        )
        c_by_f, c_by_z, h_by_o, h_by_c = _slopes(c0, f, z, o, tanh_c, p_o[None, :])
        cc, ch, hc, hh = _blocks(
            f, c_by_f, c_by_z, h_by_o, h_by_c, a_f[None, :], a_o[None, :], a_z[None, :], p_f[None, :]
        )
        k = b_keep[:, None]
        cc = tl.where(m_t, cc * k, 1.0)  # after the end: the identity hands on what comes
        hh = tl.where(m_t, hh * k, 1.0)
        ch = tl.where(m_t, ch * k, 0.0)
        hc = tl.where(m_t, hc * k, 0.0)
        b_g = tl.load(dh_ptr + at, mask=m_t, other=0.0)
        # the transposed blocks, on (c, h); the outputs' gradient is h's alone
        P00, P01, P10, P11, s_c, s_h = tl.associative_scan(
            (cc, hc, ch, hh, hc * b_g, hh * b_g), 0, then_blocks, reverse=True
        )
        s_c += P00 * c_right[None, :] + P01 * h_right[None, :]
        s_h += P10 * c_right[None, :] + P11 * h_right[None, :]
        mu_c = earlier(s_c, c_right, WINDOW, BLOCK_D)
        mu_h = b_g + earlier(s_h, h_right, WINDOW, BLOCK_D)
        c_right = row(s_c, 0, WINDOW)
        h_right = row(s_h, 0, WINDOW)
        dc = mu_c + mu_h * h_by_c
        d_f = tl.where(m_t, dc * c_by_f, 0.0)
        d_o = tl.where(m_t, mu_h * h_by_o, 0.0)
        d_z = tl.where(m_t, dc * c_by_z, 0.0)
        tl.store(du_ptr + at_u, d_f.to(du_ptr.dtype.element_ty), mask=m_t)
        tl.store(du_ptr + at_u + D, d_o.to(du_ptr.dtype.element_ty), mask=m_t)
        tl.store(du_ptr + at_u + 2 * D, d_z.to(du_ptr.dtype.element_ty), mask=m_t)
        da_f += tl.sum(d_f * h0, 0)
        da_o += tl.sum(d_o * h0, 0)
        da_z += tl.sum(d_z * h0, 0)
        dp_f += tl.sum(d_f * c0, 0)
        dp_o += tl.sum(d_o * c, 0)
    dw_ptr += i_n * 5 * D + o_d
    tl.store(dw_ptr, da_f, mask=m_d)
    tl.store(dw_ptr + D, da_o, mask=m_d)
    tl.store(dw_ptr + 2 * D, da_z, mask=m_d)
    tl.store(dw_ptr + 3 * D, dp_f, mask=m_d)
    tl.store(dw_ptr + 4 * D, dp_o, mask=m_d)
    tl.store(dstate_ptr + i_n * D + o_d, c_right, mask=m_d)
    tl.store(dstate_ptr + plane_n + i_n * D + o_d, h_right, mask=m_d)


def run(
    u: Tensor, a: Tensor, p: Tensor, state: Tensor, keep: Tensor | None, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, D), a (3, D), p (2, D), state (N, D, 2), keep (B, T, 1) or None: all states (B, T, D, 2) in u's
    dtype, and the last ones.
    """
    B, T = u.shape[:2]
    offsets = offsets_of(B, T, cuts, u.device)
    keep = None if keep is None else keep.reshape(B, T)
    s, last = para_lstm_fwd(u, a.float(), p.float(), keep, state.movedim(-1, 0), offsets)
    return s.to(u.dtype).movedim(0, -1), last.movedim(0, -1)


@torch.library.custom_op("zoo::para_lstm_fwd", mutates_args=())
@dispatch.on_its_device
def para_lstm_fwd(
    u: Tensor, a: Tensor, p: Tensor, keep: Tensor | None, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All states (2, B, T, D) and the last ones (2, N, D), float32, c first; state (2, N, D)."""
    u, a, p, state = (x.contiguous() for x in (u, a, p, state))
    (B, T, _, D), N = u.shape, state.shape[1]
    s, last = state.new_empty(2, B, T, D), torch.empty_like(state)
    para_lstm_fwd_kernel[N, triton.cdiv(D, block_of(D))](
        u, a, p, a if keep is None else keep.contiguous(), state, s, last, offsets, B * T * D, N * D, D,
        HAS_KEEP=keep is not None, ENOUGH=ENOUGH, LIMIT=LIMIT, WINDOW=WINDOW, BLOCK_D=block_of(D), num_warps=WARPS,
    )  # fmt: skip
    return s, last


@para_lstm_fwd.register_fake
def _(u, a, p, keep, state, offsets):
    B, T, _, D = u.shape
    return state.new_empty(2, B, T, D), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::para_lstm_bwd", mutates_args=())
@dispatch.on_its_device
def para_lstm_bwd(
    dh: Tensor, dlast: Tensor, u: Tensor, a: Tensor, p: Tensor, keep: Tensor | None, state: Tensor, s: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, a, p and state, for those of h (B, T, D) and of the last states (2, N, D)."""
    dh, dlast, u, a, p, state = (x.contiguous() for x in (dh, dlast, u, a, p, state))
    _, N, D = state.shape
    du, dw, dstate = torch.empty_like(u), state.new_empty(N, 5, D), torch.empty_like(state)
    para_lstm_bwd_kernel[N, triton.cdiv(D, block_of(D))](
        u, a, p, a if keep is None else keep.contiguous(), state, s, dh, dlast, du, dw, dstate, offsets,
        dh.numel(), N * D, D, HAS_KEEP=keep is not None, WINDOW=WINDOW, BLOCK_D=block_of(D), num_warps=WARPS,
    )  # fmt: skip
    dw = dw.sum(0)
    return du, dw[:3].clone(), dw[3:].clone(), dstate


@para_lstm_bwd.register_fake
def _(dh, dlast, u, a, p, keep, state, s, offsets):
    return u.new_empty(u.shape), a.new_empty(a.shape), p.new_empty(p.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    u, a, p, keep, state, offsets = inputs
    ctx.save_for_backward(u, a, p, keep, state, output[0], offsets)


@first_order("para_lstm")
def _backward(ctx, ds, dlast):
    du, da, dp, dstate = para_lstm_bwd(ds[1], dlast, *ctx.saved_tensors)
    return du, da, dp, None, dstate, None


para_lstm_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.para_lstm_fwd)
def _flops(u_shape, *args, out_shape=None, **kwargs) -> int:
    """Four corrections of gates, slopes and a scan of six levels."""
    B, T, _, D = u_shape
    return 4 * (70 + 24 * 6) * B * T * D


@register_flop_formula(torch.ops.zoo.para_lstm_bwd)
def _flops_bwd(dh_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D = dh_shape
    return (85 + 24 * 6) * B * T * D


def compile_cases() -> list[KernelCase]:
    """The forward and the backward kernel, as `compile_kernels` compiles them."""
    return cases((para_lstm_fwd_kernel, para_lstm_bwd_kernel), {"plane": "i64", "plane_n": "i64"})
