"""Triton kernels of the loss: a row of logits -> its loss, and in place its gradient. The products are torch's."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.kernel_case import KernelCase
from zoo.ops.token_wise.linear_cross_entropy.chunked import Step

TILE = 4096  # logits of a program's step; not tuned on a device yet; 8 warps hold 16 numbers a thread
NUM_WARPS = 8


@triton.jit
def linear_cross_entropy_fwd_kernel(
    z_ptr, target_ptr, loss_ptr, lse_ptr,  # (N, V) any float, (N,) int64, (N,) ACC, (N,) ACC
    N, V, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The loss and the log of the sum of exponentials of BLOCK_N rows, in one pass over the vocabulary."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_v = tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
    m = tl.full([BLOCK_N], -float("inf"), ACC)
    s = tl.zeros([BLOCK_N], ACC)  # sum of exp(z - m) so far
    for start in range(0, V, BLOCK_V):
        inside = m_n[:, None] & (start + o_v < V)[None, :]
        b_z = tl.load(z_ptr + o_n[:, None] * V + (start + o_v)[None, :], mask=inside, other=-float("inf")).to(ACC)
        m_new = tl.maximum(m, tl.max(b_z, axis=1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # exp(-inf - -inf) would be NaN
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(b_z - shift[:, None]), axis=1)
        m = m_new
    lse = m + tl.log(tl.where(m_n, s, 1.0))
    known = (target >= 0) & (target < V)
    b_t = tl.load(z_ptr + o_n * V + tl.where(known, target, 0), mask=m_n & known, other=0.0).to(ACC)
    loss = tl.where(known, lse - b_t, float("nan"))  # nobody can be told here that a target is out of range
    tl.store(loss_ptr + o_n, tl.where(target == -1, 0.0, loss), mask=m_n)
    tl.store(lse_ptr + o_n, lse, mask=m_n)


@triton.jit
def linear_cross_entropy_bwd_kernel(
    z_ptr, target_ptr, lse_ptr,  # (N, V) any float, overwritten; (N,) int64; (N,) ACC
    N, V, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Logits overwritten by their gradients, BLOCK_N rows and BLOCK_V words."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    target = tl.load(target_ptr + o_n, mask=m_n, other=-1)[:, None]
    lse = tl.load(lse_ptr + o_n, mask=m_n, other=0.0)[:, None]
    inside = m_n[:, None] & (o_v < V)[None, :]
    o_z = o_n[:, None] * V + o_v[None, :]
    b_z = tl.load(z_ptr + o_z, mask=inside, other=-float("inf")).to(ACC)
    b_p = tl.exp(b_z - lse) - (o_v[None, :] == target).to(ACC)
    b_p = tl.where(target == -1, 0.0, b_p)
    tl.store(z_ptr + o_z, b_p.to(z_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("zoo::linear_cross_entropy_fwd", mutates_args=())
@dispatch.on_its_device
def linear_cross_entropy_fwd(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z (N, V), targets (N,) int64 with -1 where not scored -> losses and log-sum-exps, (N,) fp32 or fp64."""
    z, wide = z.contiguous(), torch.promote_types(z.dtype, torch.float32)
    losses, lse = (torch.empty(len(z), dtype=wide, device=z.device) for _ in range(2))
    if len(z):
        blocks = _blocks(z.shape[1])
        linear_cross_entropy_fwd_kernel[(triton.cdiv(len(z), blocks["BLOCK_N"]),)](
            z, targets, losses, lse, *z.shape, ACC=_acc(z), **blocks, num_warps=NUM_WARPS
        )
    return losses, lse


@linear_cross_entropy_fwd.register_fake
def _(z, targets):
    wide = torch.promote_types(z.dtype, torch.float32)
    return z.new_empty(len(z), dtype=wide), z.new_empty(len(z), dtype=wide)


@torch.library.custom_op("zoo::linear_cross_entropy_bwd", mutates_args=("z",))
@dispatch.on_its_device
def linear_cross_entropy_bwd(z: Tensor, targets: Tensor, lse: Tensor) -> None:
    """Turn logits z (N, V) into softmax(z) - onehot(targets); zeros in rows that are not scored."""
    if len(z):
        blocks = _blocks(z.shape[1])
        grid = (triton.cdiv(len(z), blocks["BLOCK_N"]), triton.cdiv(z.shape[1], blocks["BLOCK_V"]))
        linear_cross_entropy_bwd_kernel[grid](z, targets, lse, *z.shape, ACC=_acc(z), **blocks, num_warps=NUM_WARPS)


@linear_cross_entropy_bwd.register_fake
def _(z, targets, lse):
    return None


def _blocks(V: int) -> dict[str, int]:
    """A program's tile: a part of one row of a large vocabulary, several rows of a small one."""
    block = min(TILE, triton.next_power_of_2(V))
    return {"BLOCK_N": TILE // block, "BLOCK_V": block}


def _acc(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, dlosses, _dlse):
    z, targets, lse = ctx.saved_tensors
    dz = z.clone()
    linear_cross_entropy_bwd(dz, targets, lse)
    return (dz * dlosses[:, None]).to(z.dtype), None


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.zoo.linear_cross_entropy_fwd, torch.ops.zoo.linear_cross_entropy_bwd])
def _flops(z_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * z_shape[0] * z_shape[1]


def _losses(z: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_fwd(z, targets)[0]


def _gradients_(z: Tensor, targets: Tensor) -> Tensor:
    losses, lse = linear_cross_entropy_fwd(z, targets)
    linear_cross_entropy_bwd(z, targets, lse)
    return losses


TRITON_STEP = Step(_losses, _gradients_)


def compile_cases() -> list[KernelCase]:
    """Logits in bfloat16 and float32 for the vocabularies of bytes and of the published models."""
    cases = []
    for dtype, V in itertools.product(("bf16", "fp32"), (257, 32000)):
        io = {"z_ptr": f"*{dtype}", "target_ptr": "*i64", "lse_ptr": "*fp32", "N": "i32", "V": "i32"}
        constants = {"ACC": tl.float32, **_blocks(V)}
        cases += [
            KernelCase(linear_cross_entropy_fwd_kernel, io | {"loss_ptr": "*fp32"}, constants, NUM_WARPS),
            KernelCase(linear_cross_entropy_bwd_kernel, io, constants, NUM_WARPS),
        ]
    return cases
