"""Triton kernels of the Vandermonde product K_l = 2 Re sum_n w_n exp(l z_n), forward and backward, in real numbers.

A program makes ROWS x COLUMNS consecutive numbers of one kernel. With l = c COLUMNS + r and exp(l z) = exp(c COLUMNS z)
exp(r z), a tile costs ROWS + COLUMNS exponentials a mode and two matrix products over the modes. Phases arrive in
[-pi, pi] per step and per row (see vandermonde.py). Every sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase
from zoo.ops.state_spaces.s4.vandermonde import times

COLUMNS = 64  # steps of a row; not tuned on a device yet
ROWS = 32  # rows of a tile: 2048 numbers of a kernel for 96 exponentials a mode
BLOCK_N = 16  # modes at once
WARPS = 4


@triton.jit
def _cos_sin(x):
    """To 2e-7 for |x| up to 1e5: quarter turns taken off in three steps, then Taylor-like polynomials (Cephes' fits).

    libdevice's own keep a table for huge angles on the stack, and a GPU's fast ones are only good near zero.
    """
    quarters = tl.floor(x * 0.6366197723675814 + 0.5)
    x = ((x - quarters * 1.5703125) - quarters * 4.8351287841796875e-4) - quarters * 3.13855707645416259765625e-7
    x = x - quarters * 6.077094383e-11
    q = quarters.to(tl.int32) & 3
    s = x * x
    sin = x + x * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    cos = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    odd = (q & 1) == 1
    b_cos = tl.where(odd, sin, cos)
    b_sin = tl.where(odd, cos, sin)
    return tl.where((q == 1) | (q == 2), -b_cos, b_cos), tl.where(q >= 2, -b_sin, b_sin)


@triton.jit
def _powers(z_ptr, offsets, mask, steps):
    """exp(steps z) for a row of modes z at `offsets` and a column of whole numbers, or the other way round."""
    decay = tl.exp(tl.load(z_ptr + offsets, mask=mask, other=0.0) * steps)
    cos, sin = _cos_sin(tl.load(z_ptr + offsets + 1, mask=mask, other=0.0) * steps)
    return decay * cos, decay * sin


@triton.jit
def vandermonde_fwd_kernel(
    z_ptr, zr_ptr, w_ptr, K_ptr,  # (H, N, 2), (H, N, 2) of a whole row, (n*H, N, 2), (n*H, L); all fp32
    H, N, L, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS consecutive numbers of one of the kernels K (n*H, L)."""
    i_g = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS
    o_c = row + tl.arange(0, ROWS)
    o_r = tl.arange(0, COLUMNS)
    z_ptr += i_g % H * N * 2
    zr_ptr += i_g % H * N * 2
    w_ptr += i_g * N * 2
    b_K = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        e_re, e_im = _powers(z_ptr, 2 * o_n[:, None], m_n[:, None], o_r[None, :].to(tl.float32))
        f_re, f_im = _powers(zr_ptr, 2 * o_n[None, :], m_n[None, :], o_c[:, None].to(tl.float32))
        w_re = 2 * tl.load(w_ptr + 2 * o_n, mask=m_n, other=0.0)[None, :]
        w_im = 2 * tl.load(w_ptr + 2 * o_n + 1, mask=m_n, other=0.0)[None, :]
        b_K += tl.dot(w_re * f_re - w_im * f_im, e_re, input_precision=PRECISION)
        b_K -= tl.dot(w_re * f_im + w_im * f_re, e_im, input_precision=PRECISION)
    o_l = o_c[:, None] * COLUMNS + o_r[None, :]
    tl.store(K_ptr + i_g * L + o_l, b_K, mask=o_l < L)


@triton.jit
def vandermonde_bwd_kernel(
    z_ptr, zr_ptr, dK_ptr, sums_ptr,  # (H, N, 2) twice, (n*H, L), (n*H, tiles, N, 4); all fp32
    H, N, L, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's share of sum_l dK_l exp(l z) and of sum_l l dK_l exp(l z)."""
    i_g = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    o_c = i_t * ROWS + tl.arange(0, ROWS)
    o_r = tl.arange(0, COLUMNS)
    z_ptr += i_g % H * N * 2
    zr_ptr += i_g % H * N * 2
    sums_ptr += (i_g * tl.num_programs(1) + i_t) * N * 4
    o_l = o_c[:, None] * COLUMNS + o_r[None, :]
    b_dK = tl.load(dK_ptr + i_g * L + o_l, mask=o_l < L, other=0.0)
    b_later = b_dK * o_r[None, :].to(tl.float32)
    first = (o_c * COLUMNS).to(tl.float32)[:, None]
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        e_re, e_im = _powers(z_ptr, 2 * o_n[None, :], m_n[None, :], o_r[:, None].to(tl.float32))
        f_re, f_im = _powers(zr_ptr, 2 * o_n[None, :], m_n[None, :], o_c[:, None].to(tl.float32))
        g_re = tl.dot(b_dK, e_re, input_precision=PRECISION)
        g_im = tl.dot(b_dK, e_im, input_precision=PRECISION)
        h_re = first * g_re + tl.dot(b_later, e_re, input_precision=PRECISION)
        h_im = first * g_im + tl.dot(b_later, e_im, input_precision=PRECISION)
        tl.store(sums_ptr + 4 * o_n, tl.sum(f_re * g_re - f_im * g_im, axis=0), mask=m_n)
        tl.store(sums_ptr + 4 * o_n + 1, tl.sum(f_re * g_im + f_im * g_re, axis=0), mask=m_n)
        tl.store(sums_ptr + 4 * o_n + 2, tl.sum(f_re * h_re - f_im * h_im, axis=0), mask=m_n)
        tl.store(sums_ptr + 4 * o_n + 3, tl.sum(f_re * h_im + f_im * h_re, axis=0), mask=m_n)


OPTIONS = {
    "PRECISION": dispatch.EXACT_PRODUCTS, "ROWS": ROWS, "COLUMNS": COLUMNS, "BLOCK_N": BLOCK_N, "num_warps": WARPS,
}  # fmt: skip


@torch.library.custom_op("zoo::vandermonde_fwd", mutates_args=())
@dispatch.on_its_device
def vandermonde_fwd(z: Tensor, w: Tensor, length: int) -> Tensor:
    """z (H, N, 2), w (n, H, N, 2), float32 -> K (n, H, length)."""
    w = w.contiguous()
    n, H, N, _ = w.shape
    K = w.new_empty(n, H, length)
    grid = (n * H, triton.cdiv(length, ROWS * COLUMNS))
    vandermonde_fwd_kernel[grid](times(z, 1), times(z, COLUMNS), w, K, H, N, length, **OPTIONS)
    return K


@vandermonde_fwd.register_fake
def _(z, w, length):
    return w.new_empty(w.shape[0], w.shape[1], length)


@torch.library.custom_op("zoo::vandermonde_bwd", mutates_args=())
@dispatch.on_its_device
def vandermonde_bwd(dK: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and w."""
    dK = dK.contiguous()
    n, H, N, _ = w.shape
    L = dK.shape[2]
    tiles = triton.cdiv(L, ROWS * COLUMNS)
    sums = dK.new_empty(n, H, tiles, N, 4)
    vandermonde_bwd_kernel[(n * H, tiles)](times(z, 1), times(z, COLUMNS), dK, sums, H, N, L, **OPTIONS)
    g_re, g_im, h_re, h_im = sums.sum(2).unbind(-1)  # (n, H, N)
    # K is the real part of a holomorphic function: its gradient is the conjugate of twice the derivative
    dz_re, dz_im = w[..., 0] * h_re - w[..., 1] * h_im, w[..., 0] * h_im + w[..., 1] * h_re
    return 2 * torch.stack([dz_re, -dz_im], dim=-1).sum(0), 2 * torch.stack([g_re, -g_im], dim=-1)


@vandermonde_bwd.register_fake
def _(dK, z, w):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(
        w, memory_format=torch.contiguous_format
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


@first_order("s4")
def _backward(ctx, dK):
    return *vandermonde_bwd(dK, *ctx.saved_tensors), None


vandermonde_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.vandermonde_fwd)
def _flops(z_shape, w_shape, length, *args, out_shape=None, **kwargs) -> int:
    n, H, N, _ = w_shape
    return 4 * n * H * N * length


@register_flop_formula(torch.ops.zoo.vandermonde_bwd)
def _flops_bwd(dK_shape, z_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    n, H, L = dK_shape
    return 8 * n * H * w_shape[2] * L


def compile_cases() -> list[KernelCase]:
    """One case: sizes are run-time arguments and all is float32."""
    constants = {name: value for name, value in OPTIONS.items() if name != "num_warps"}
    cases = []
    for kernel in (vandermonde_fwd_kernel, vandermonde_bwd_kernel):
        signature = {x: "*fp32" if x.endswith("_ptr") else "i32" for x in kernel.arg_names if x not in constants}
        cases.append(KernelCase(kernel, signature, constants, num_warps=WARPS, label="fp32"))
    return cases
