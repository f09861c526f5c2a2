"""Triton kernel of the rotation; its backward pass is the same kernel with the angle's sign turned."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase
from zoo.ops.token_wise.rotary.fused import table_gradients

TILE = 1024  # pairs of a program's tile; not tuned on a device yet


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,  # (B * T * H, K), (B or 1, T, K / 2) twice, (B * T * H, K)
    N, H, rows,  # N = B * T * H; rows: of the tables, T where all batches share them
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of heads with every pair of channels turned by its position's angle."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m = (o_n < N)[:, None] & (o_k < HALF)[None, :]
    if INTERLEAVED:
        o_a = o_n[:, None] * (2 * HALF) + 2 * o_k[None, :]
        o_b = o_a + 1
    else:
        o_a = o_n[:, None] * (2 * HALF) + o_k[None, :]
        o_b = o_a + HALF
    o_c = (o_n // H % rows)[:, None] * HALF + o_k[None, :]
    b_cos = tl.load(cos_ptr + o_c, mask=m, other=0.0).to(ACC)
    b_sin = tl.load(sin_ptr + o_c, mask=m, other=0.0).to(ACC)
    if BACKWARD:
        b_sin = -b_sin
    b_a = tl.load(x_ptr + o_a, mask=m, other=0.0).to(ACC)
    b_b = tl.load(x_ptr + o_b, mask=m, other=0.0).to(ACC)
    tl.store(y_ptr + o_a, (b_a * b_cos - b_b * b_sin).to(y_ptr.dtype.element_ty), mask=m)
    tl.store(y_ptr + o_b, (b_a * b_sin + b_b * b_cos).to(y_ptr.dtype.element_ty), mask=m)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    _, T, H, K = x.shape
    y, N = torch.empty_like(x), x.numel() // K
    blocks = _blocks(K // 2)
    if N:
        rotary_kernel[(triton.cdiv(N, blocks["BLOCK_N"]),)](
            x, cos, sin, y, N, H, cos.shape[0] * T,
            HALF=K // 2, INTERLEAVED=interleaved, BACKWARD=backward, ACC=_acc(x), **blocks,
        )  # fmt: skip
    return y


@torch.library.custom_op("zoo::rotary_fwd", mutates_args=())
@dispatch.on_its_device
def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, T, H, K), tables (B or 1, T, K / 2) -> as x."""
    return _launch(x, cos, sin, interleaved, False)


@torch.library.custom_op("zoo::rotary_bwd", mutates_args=())
@dispatch.on_its_device
def rotary_bwd(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of x."""
    return _launch(dy, cos, sin, interleaved, True)


@rotary_fwd.register_fake
def _(x, cos, sin, interleaved):
    return x.new_empty(x.shape)


@rotary_bwd.register_fake
def _(dy, cos, sin, interleaved):
    return dy.new_empty(dy.shape)


def _blocks(half: int) -> dict[str, int]:
    block = triton.next_power_of_2(half)
    return {"BLOCK_N": max(1, TILE // block), "BLOCK_K": block}


def _acc(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _save(ctx, inputs, output) -> None:
    x, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, cos, sin)


@first_order("rotary")
def _backward(ctx, dy):
    x, cos, sin = ctx.saved_tensors
    dcos, dsin = (None, None) if x is None else table_gradients(dy, x, cos, ctx.interleaved)
    return rotary_bwd(dy, cos, sin, ctx.interleaved), dcos, dsin, None


rotary_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.zoo.rotary_fwd, torch.ops.zoo.rotary_bwd])
def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 3 * x_shape.numel()


def compile_cases() -> list[KernelCase]:
    """What the published transformers launch: heads of 64 and 128, in both layouts and directions."""
    cases = []
    for dtype, K, layout in itertools.product(("bf16", "fp32"), (64, 128), (False, True)):
        io = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        io |= {"N": "i32", "H": "i32", "rows": "i32"}
        flags = {"HALF": K // 2, "INTERLEAVED": layout, "ACC": tl.float32, **_blocks(K // 2)}
        cases += [KernelCase(rotary_kernel, io, flags | {"BACKWARD": backward}) for backward in (False, True)]
    return cases
