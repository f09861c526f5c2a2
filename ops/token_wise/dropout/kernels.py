"""Triton kernel of dropout: four neighbouring channels share a counter; the mask is made again in the backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.kernel_case import KernelCase

BLOCK = 512  # counters of a program, 16 numbers a thread; not swept: the work is 10 rounds of integer products


@triton.jit(do_not_specialize=["seed", "stream", "least"])
def dropout_kernel(
    x_ptr,
    at_ptr,
    scale_ptr,
    y_ptr,  # (N, D), (2, N), (1,) in ACC's precision, (N, D)
    seed,
    stream,
    least,
    N,
    D,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK groups of four channels, each dropped or scaled by the mask that its counter makes."""
    groups = tl.cdiv(D, 4)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N * groups
    o_n, o_g = o // groups, o % groups
    b_row = tl.load(at_ptr + o_n, mask=m, other=0)
    b_position = tl.load(at_ptr + N + o_n, mask=m, other=0)
    b_stream = tl.zeros([BLOCK], tl.uint32) + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed.to(tl.uint64), o_g.to(tl.uint32), b_position.to(tl.uint32), b_row.to(tl.uint32), b_stream
    )
    # [BLOCK, 2, 2] -> [BLOCK, 4]: word j belongs to channel 4 g + j
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([BLOCK, 4])
    o_d = o_g[:, None] * 4 + tl.arange(0, 4)[None, :]
    o_x = o_n[:, None] * D + o_d
    m_x = m[:, None] & (o_d < D)
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(ACC)
    b_y = tl.where(b_words.to(tl.int64) >= least, b_x * tl.load(scale_ptr), 0.0)
    tl.store(y_ptr + o_x, b_y.to(y_ptr.dtype.element_ty), mask=m_x)


@torch.library.custom_op("zoo::dropout_fwd", mutates_args=())
@dispatch.on_its_device
def dropout_fwd(x: Tensor, least: int, scale: float, seed: int, stream: int, at: Tensor) -> Tensor:
    """x (B, T, D), at (2, B, T) int64 -> as x. Its gradient is itself: the same mask, made again."""
    x, at = x.contiguous(), at.contiguous()
    y, D = torch.empty_like(x), x.shape[-1]
    if x.numel():
        N, wide = x.numel() // D, torch.promote_types(x.dtype, torch.float32)
        grid = (triton.cdiv(N * triton.cdiv(D, 4), BLOCK),)
        factor = torch.full((1,), scale, dtype=wide, device=x.device)
        acc = tl.float64 if wide == torch.float64 else tl.float32
        dropout_kernel[grid](x, at, factor, y, seed, stream, least, N, D, ACC=acc, BLOCK=BLOCK)
    return y


@dropout_fwd.register_fake
def _(x, least, scale, seed, stream, at):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    _, *ctx.numbers, at = inputs
    ctx.save_for_backward(at)


def _backward(ctx, dy):
    return dropout_fwd(dy, *ctx.numbers, *ctx.saved_tensors), None, None, None, None, None


dropout_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.dropout_fwd)
def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 25 * x_shape.numel()  # integer operations for the most part


def compile_cases() -> list[KernelCase]:
    """Sizes are run-time numbers: one case a dtype."""
    return [
        KernelCase(
            dropout_kernel,
            {
                "x_ptr": f"*{dtype}", "at_ptr": "*i64", "scale_ptr": "*fp32", "y_ptr": f"*{dtype}",
                "seed": "i64", "stream": "i32", "least": "i64", "N": "i32", "D": "i32",
            },
            {"ACC": tl.float32, "BLOCK": BLOCK},
        )
        for dtype in ("bf16", "fp32")
    ]  # fmt: skip
