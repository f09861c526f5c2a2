"""Triton kernels of RMSNorm and its gated forms: whole rows in registers, nothing saved but the inputs."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

PLAIN, NORM_FIRST, GATE_FIRST = 0, 1, 2
TILE = 1024  # numbers of a program's tile, one row at least; not tuned on a device yet
STACK = 8  # bytes the compiler puts on the stack of some backward cases, at 72 to 92 of 255 registers: not pressure
PROGRAMS = 256  # of the backward pass: each adds up the weight gradient of its rows, and their sums are added last


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))  # an exponent above 0 could overflow
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr,  # (N, D), (N, D), (D,), (N, D)
    N, D, eps,
    GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N normalised rows; the gate acts after the norm (GATE = 1), before it (2), or not at all (0)."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    o = o_n[:, None] * D + o_d[None, :]
    b_y = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
    if GATE == 2:
        b_z = tl.load(gate_ptr + o, mask=m, other=0.0).to(ACC)
        b_y = b_y * b_z * _sigmoid(b_z)
    b_y = b_y / tl.sqrt(tl.sum(b_y * b_y, axis=1) / D + eps)[:, None]
    if HAS_WEIGHT:
        b_y = b_y * tl.load(weight_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
    if GATE == 1:
        b_z = tl.load(gate_ptr + o, mask=m, other=0.0).to(ACC)
        b_y = b_y * b_z * _sigmoid(b_z)
    tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, dx_ptr, dgate_ptr, dweight_ptr,  # rows (N, D); weight (D,); dweight (P, D) ACC
    N, D, eps,
    GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of rows and gates, and one sum of the weight's gradient for each program."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_dw = tl.zeros([BLOCK_D], dtype=ACC)
    if HAS_WEIGHT:
        b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    for i_n in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        o_n = tl.full([BLOCK_N], i_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = (o_n < N)[:, None] & m_d[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        b_d = tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
        b_u = b_x
        if GATE > 0:
            b_z = tl.load(gate_ptr + o, mask=m, other=0.0).to(ACC)
            b_sig = _sigmoid(b_z)
            b_silu, b_dsilu = b_z * b_sig, b_sig * (1.0 + b_z * (1.0 - b_sig))
        if GATE == 2:
            b_u = b_x * b_silu
        b_r = 1.0 / tl.sqrt(tl.sum(b_u * b_u, axis=1) / D + eps)
        b_hat = b_u * b_r[:, None]
        if GATE == 1:
            b_dz = b_d * b_hat * b_dsilu
            if HAS_WEIGHT:
                b_dz = b_dz * b_w[None, :]
            tl.store(dgate_ptr + o, b_dz.to(dgate_ptr.dtype.element_ty), mask=m)
            b_d = b_d * b_silu
        if HAS_WEIGHT:
            b_dw += tl.sum(b_d * b_hat, axis=0)
            b_d = b_d * b_w[None, :]
        b_du = (b_d - b_hat * (tl.sum(b_d * b_hat, axis=1) / D)[:, None]) * b_r[:, None]
        if GATE == 2:
            tl.store(dgate_ptr + o, (b_du * b_x * b_dsilu).to(dgate_ptr.dtype.element_ty), mask=m)
            b_du = b_du * b_silu
        tl.store(dx_ptr + o, b_du.to(dx_ptr.dtype.element_ty), mask=m)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + o_d, b_dw, mask=m_d)


@torch.library.custom_op("zoo::rms_norm_fwd", mutates_args=())
@dispatch.on_its_device
def rms_norm_fwd(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool) -> Tensor:
    """x, gate (..., D), weight (D,) -> (..., D)."""
    x, D = x.contiguous(), x.shape[-1]
    gate_, weight_ = (x if given is None else given.contiguous() for given in (gate, weight))
    y, N = torch.empty_like(x), x.numel() // D
    blocks, warps = _blocks(D)
    if N:
        rms_norm_fwd_kernel[(triton.cdiv(N, blocks["BLOCK_N"]),)](
            x, gate_, weight_, y, N, D, eps,
            GATE=_gate(gate, gate_first), HAS_WEIGHT=weight is not None, ACC=_acc(x), **blocks, num_warps=warps,
        )  # fmt: skip
    return y


@rms_norm_fwd.register_fake
def _(x, gate, weight, eps, gate_first):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::rms_norm_bwd", mutates_args=())
@dispatch.on_its_device
def rms_norm_bwd(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty without one) and weight (empty without one)."""
    dy, x, D = dy.contiguous(), x.contiguous(), x.shape[-1]
    gate_, weight_ = (x if given is None else given.contiguous() for given in (gate, weight))
    N = x.numel() // D
    blocks, warps = _blocks(D)
    programs = min(PROGRAMS, triton.cdiv(N, blocks["BLOCK_N"]))
    dx, dgate = torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    dweight = torch.empty(programs, 0 if weight is None else D, dtype=wide, device=x.device)
    if N:
        rms_norm_bwd_kernel[(programs,)](
            dy, x, gate_, weight_, dx, dgate, dweight, N, D, eps,
            GATE=_gate(gate, gate_first), HAS_WEIGHT=weight is not None, ACC=_acc(x), **blocks, num_warps=warps,
        )  # fmt: skip
    return dx, dgate, dweight.sum(0).to(weight_.dtype)


@rms_norm_bwd.register_fake
def _(dy, x, gate, weight, eps, gate_first):
    dgate = x.new_empty(0) if gate is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), dgate, x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _gate(gate: Tensor | None, gate_first: bool) -> int:
    if gate is None:
        return PLAIN
    return GATE_FIRST if gate_first else NORM_FIRST


def _blocks(D: int) -> tuple[dict[str, int], int]:
    """Some rows of a tile, and the warps: 8 numbers a thread, with 16 or 32 the backward pass spills."""
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // block)
    return {"BLOCK_N": rows, "BLOCK_D": block}, min(32, max(4, rows * block // 256))


def _acc(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.gate_first = inputs
    ctx.save_for_backward(*tensors)


@first_order("rms_norm")
def _backward(ctx, dy):
    x, gate, weight = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    dx, dgate, dweight = rms_norm_bwd(dy, x, gate, weight, ctx.eps, ctx.gate_first)
    return dx, None if gate is None else dgate, None if weight is None else dweight, None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.rms_norm_fwd)
def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * x_shape.numel()


@register_flop_formula(torch.ops.zoo.rms_norm_bwd)
def _flops_bwd(dy_shape, *args, out_shape=None, **kwargs) -> int:
    return 9 * dy_shape.numel()


def compile_cases() -> list[KernelCase]:
    """What the published models launch: d_model 1024 to 4096 plain, heads of 128 to 512 gated."""
    cases = []
    for dtype, (gate, D) in itertools.product(("bf16", "fp32"), ((0, 1024), (0, 4096), (1, 128), (1, 512), (2, 4096))):
        names = ("x_ptr", "gate_ptr", "weight_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dgate_ptr")
        io = dict.fromkeys(names, f"*{dtype}") | {"dweight_ptr": "*fp32", "N": "i32", "D": "i32", "eps": "fp32"}
        blocks, warps = _blocks(D)
        constants = {"GATE": gate, "HAS_WEIGHT": True, "ACC": tl.float32, **blocks}
        for kernel in (rms_norm_fwd_kernel, rms_norm_bwd_kernel):
            signature = {name: io[name] for name in kernel.arg_names if name in io}
            cases.append(
                KernelCase(kernel, signature, constants, warps, spills=STACK if kernel is rms_norm_bwd_kernel else 0)
            )
    return cases
