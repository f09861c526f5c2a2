"""Triton kernels of the SwiGLU's product, elementwise."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

BLOCK = 2048  # not tuned on a device yet: 16 numbers a thread, in loads of 16 bytes


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))  # an exponent above 0 could overflow
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def swiglu_fwd_kernel(gate_ptr, up_ptr, y_ptr, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up for BLOCK numbers."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    b_gate = tl.load(gate_ptr + o, mask=m, other=0.0).to(ACC)
    b_up = tl.load(up_ptr + o, mask=m, other=0.0).to(ACC)
    tl.store(y_ptr + o, (b_gate * _sigmoid(b_gate) * b_up).to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def swiglu_bwd_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of gate and up for BLOCK numbers."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
    b_gate = tl.load(gate_ptr + o, mask=m, other=0.0).to(ACC)
    b_up = tl.load(up_ptr + o, mask=m, other=0.0).to(ACC)
    b_sig = _sigmoid(b_gate)
    b_dgate = b_dy * b_up * b_sig * (1.0 + b_gate * (1.0 - b_sig))
    tl.store(dgate_ptr + o, b_dgate.to(dgate_ptr.dtype.element_ty), mask=m)
    tl.store(dup_ptr + o, (b_dy * b_gate * b_sig).to(dup_ptr.dtype.element_ty), mask=m)


@torch.library.custom_op("zoo::swiglu_fwd", mutates_args=())
@dispatch.on_its_device
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up of one shape -> the same."""
    gate, up = gate.contiguous(), up.contiguous()
    y, N = torch.empty_like(gate), gate.numel()
    if N:
        swiglu_fwd_kernel[(triton.cdiv(N, BLOCK),)](gate, up, y, N, ACC=_acc(gate), BLOCK=BLOCK)
    return y


@swiglu_fwd.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("zoo::swiglu_bwd", mutates_args=())
@dispatch.on_its_device
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, N = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if N:
        swiglu_bwd_kernel[(triton.cdiv(N, BLOCK),)](dy, gate, up, dgate, dup, N, ACC=_acc(gate), BLOCK=BLOCK)
    return dgate, dup


@swiglu_bwd.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _acc(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@first_order("swiglu")
def _backward(ctx, dy):
    return swiglu_bwd(dy, *ctx.saved_tensors)


swiglu_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.swiglu_fwd)
def _flops(gate_shape, *args, out_shape=None, **kwargs) -> int:
    return 5 * gate_shape.numel()


@register_flop_formula(torch.ops.zoo.swiglu_bwd)
def _flops_bwd(dy_shape, *args, out_shape=None, **kwargs) -> int:
    return 11 * dy_shape.numel()


def compile_cases() -> list[KernelCase]:
    """Sizes are run-time numbers: one case a dtype."""
    cases = []
    for dtype in ("bf16", "fp32"):
        for kernel in (swiglu_fwd_kernel, swiglu_bwd_kernel):
            signature = {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")} | {"N": "i32"}
            cases.append(KernelCase(kernel, signature, {"ACC": tl.float32, "BLOCK": BLOCK}))
    return cases
