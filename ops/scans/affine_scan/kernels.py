"""Triton kernels of the elementwise affine scan, forward and backward.

Three launches each way, so that long sequences fill the device whatever their number: chunks of time side by side,
each from a zero state; the chunks' elements one after the other; the chunks again, each from its own state. Every sum
has one order: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

CHUNK = 64  # steps of a chunk; not tuned on a device yet
BLOCK_D = 128  # channels of a program; a row of one warp's loads is then 128 bytes and more
WARPS = 2


@triton.jit
def affine_fwd_summary_kernel(
    a_ptr, b_ptr, p_ptr, g_ptr,  # (B*T, D) twice, (G, D) fp32 twice
    begin_ptr, end_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each chunk does to any state: h -> p * h + g."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    a_ptr += begin * D + o_d
    b_ptr += begin * D + o_d
    b_p = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    b_g = tl.zeros([BLOCK_D], dtype=tl.float32)
    for _ in range(size):
        b_a = tl.load(a_ptr, mask=m_d, other=0.0).to(tl.float32)
        b_g = b_a * b_g + tl.load(b_ptr, mask=m_d, other=0.0).to(tl.float32)
        b_p *= b_a
        a_ptr += D
        b_ptr += D
    tl.store(p_ptr + i_c * D + o_d, b_p, mask=m_d)
    tl.store(g_ptr + i_c * D + o_d, b_g, mask=m_d)


@triton.jit
def affine_fwd_states_kernel(
    p_ptr, g_ptr, state_ptr, starts_ptr, last_ptr,  # (G, D) twice, (N, D), (G, D), (N, D), all fp32
    offsets_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a document, and the one after its last."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    first = tl.load(offsets_ptr + i_n)
    n = (tl.load(offsets_ptr + i_n + 1) - first).to(tl.int32)
    p_ptr += first * D + o_d
    g_ptr += first * D + o_d
    starts_ptr += first * D + o_d
    b_h = tl.load(state_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    for _ in range(n):
        tl.store(starts_ptr, b_h, mask=m_d)
        b_h = tl.load(p_ptr, mask=m_d, other=0.0) * b_h + tl.load(g_ptr, mask=m_d, other=0.0)
        p_ptr += D
        g_ptr += D
        starts_ptr += D
    tl.store(last_ptr + i_n * D + o_d, b_h, mask=m_d)


@triton.jit
def affine_fwd_kernel(
    a_ptr, b_ptr, starts_ptr, h_ptr,  # (B*T, D) twice, (G, D) fp32, (B*T, D)
    begin_ptr, end_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states of one chunk and one block of channels, from the state before the chunk."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    a_ptr += begin * D + o_d
    b_ptr += begin * D + o_d
    h_ptr += begin * D + o_d
    b_h = tl.load(starts_ptr + i_c * D + o_d, mask=m_d, other=0.0)
    for _ in range(size):
        b_a = tl.load(a_ptr, mask=m_d, other=0.0).to(tl.float32)
        b_h = b_a * b_h + tl.load(b_ptr, mask=m_d, other=0.0).to(tl.float32)
        tl.store(h_ptr, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
        a_ptr += D
        b_ptr += D
        h_ptr += D


@triton.jit
def affine_bwd_summary_kernel(
    a_ptr, dh_ptr, p_ptr, g_ptr,  # (B*T, D) twice, (G, D) fp32 twice
    begin_ptr, end_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each chunk does to the gradient of the state after it, on its way to the state before it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, end = tl.load(begin_ptr + i_c), tl.load(end_ptr + i_c)
    size = (end - begin).to(tl.int32)
    a_ptr += (end - 1) * D + o_d
    dh_ptr += (end - 1) * D + o_d
    b_p = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    b_g = tl.zeros([BLOCK_D], dtype=tl.float32)
    for _ in range(size):
        b_a = tl.load(a_ptr, mask=m_d, other=0.0).to(tl.float32)
        b_g = b_a * (b_g + tl.load(dh_ptr, mask=m_d, other=0.0).to(tl.float32))
        b_p *= b_a
        a_ptr -= D
        dh_ptr -= D
    tl.store(p_ptr + i_c * D + o_d, b_p, mask=m_d)
    tl.store(g_ptr + i_c * D + o_d, b_g, mask=m_d)


@triton.jit
def affine_bwd_states_kernel(
    p_ptr, g_ptr, dlast_ptr, afters_ptr, dstate_ptr,  # (G, D) twice, (N, D), (G, D), (N, D), all fp32
    offsets_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient that reaches each chunk from after it, and the one of the document's initial state."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    stop = tl.load(offsets_ptr + i_n + 1)
    n = (stop - tl.load(offsets_ptr + i_n)).to(tl.int32)
    p_ptr += (stop - 1) * D + o_d
    g_ptr += (stop - 1) * D + o_d
    afters_ptr += (stop - 1) * D + o_d
    b_d = tl.load(dlast_ptr + i_n * D + o_d, mask=m_d, other=0.0)
    for _ in range(n):
        tl.store(afters_ptr, b_d, mask=m_d)
        b_d = tl.load(p_ptr, mask=m_d, other=0.0) * b_d + tl.load(g_ptr, mask=m_d, other=0.0)
        p_ptr -= D
        g_ptr -= D
        afters_ptr -= D
    tl.store(dstate_ptr + i_n * D + o_d, b_d, mask=m_d)


@triton.jit
def affine_bwd_kernel(
    a_ptr, h_ptr, state_ptr, dh_ptr, afters_ptr,  # (B*T, D) twice, (N, D) fp32, (B*T, D), (G, D) fp32
    da_ptr, db_ptr,  # (B*T, D)
    begin_ptr, end_ptr, document_ptr, offsets_ptr, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a and b in one chunk, walked against time from the gradient after it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, end = tl.load(begin_ptr + i_c), tl.load(end_ptr + i_c)
    i_n = tl.load(document_ptr + i_c)
    a_ptr += (end - 1) * D + o_d
    h_ptr += (end - 2) * D + o_d  # the state before the step
    dh_ptr += (end - 1) * D + o_d
    da_ptr += (end - 1) * D + o_d
    db_ptr += (end - 1) * D + o_d
    b_d = tl.load(afters_ptr + i_c * D + o_d, mask=m_d, other=0.0)
    for _ in range((end - begin).to(tl.int32) - 1):
        b_d += tl.load(dh_ptr, mask=m_d, other=0.0).to(tl.float32)
        b_before = tl.load(h_ptr, mask=m_d, other=0.0).to(tl.float32)
        tl.store(da_ptr, (b_d * b_before).to(da_ptr.dtype.element_ty), mask=m_d)
        tl.store(db_ptr, b_d.to(db_ptr.dtype.element_ty), mask=m_d)
        b_d *= tl.load(a_ptr, mask=m_d, other=0.0).to(tl.float32)
        a_ptr -= D
        h_ptr -= D
        dh_ptr -= D
        da_ptr -= D
        db_ptr -= D
    # the chunk's first step, whose past is in the document's state or in h: disjoint masks, one of the two is zero
    is_first = i_c + o_d * 0 == tl.load(offsets_ptr + i_n)
    b_before = tl.load(state_ptr + i_n * D + o_d, mask=m_d & is_first, other=0.0)
    b_before += tl.load(h_ptr, mask=m_d & (is_first == 0), other=0.0).to(tl.float32)
    b_d += tl.load(dh_ptr, mask=m_d, other=0.0).to(tl.float32)
    tl.store(da_ptr, (b_d * b_before).to(da_ptr.dtype.element_ty), mask=m_d)
    tl.store(db_ptr, b_d.to(db_ptr.dtype.element_ty), mask=m_d)


def _elements(state: Tensor, n: int) -> list[Tensor]:
    """Room for p, g and the states between chunks, (G, D) float32 each."""
    return [state.new_empty(n, *state.shape[1:]) for _ in range(3)]


@torch.library.custom_op("zoo::affine_fwd", mutates_args=())
@dispatch.on_its_device
def affine_fwd(
    a: Tensor, b: Tensor, state: Tensor, begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """a, b (B, T, D), state (N, D) float32, the fields of a ChunkTable of CHUNK -> h (B, T, D), the last states."""
    a, b, state = a.contiguous(), b.contiguous(), state.contiguous()
    (N, D), n, h = state.shape, begin.shape[0], torch.empty_like(b)
    p, g, starts = _elements(state, n)
    last, blocks, options = torch.empty_like(state), triton.cdiv(D, BLOCK_D), {"BLOCK_D": BLOCK_D, "num_warps": WARPS}
    affine_fwd_summary_kernel[n, blocks](a, b, p, g, begin, end, D, **options)
    affine_fwd_states_kernel[N, blocks](p, g, state, starts, last, offsets, D, **options)
    affine_fwd_kernel[n, blocks](a, b, starts, h, begin, end, D, **options)
    return h, last


@affine_fwd.register_fake
def _(a, b, state, begin, end, document, offsets):
    return b.new_empty(b.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::affine_bwd", mutates_args=())
@dispatch.on_its_device
def affine_bwd(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, b and state."""
    dh, dlast, a, h, state = (x.contiguous() for x in (dh, dlast, a, h, state))
    (N, D), n = state.shape, begin.shape[0]
    p, g, afters = _elements(state, n)
    da, db, dstate = torch.empty_like(a), torch.empty_like(h), torch.empty_like(state)
    blocks, options = triton.cdiv(D, BLOCK_D), {"BLOCK_D": BLOCK_D, "num_warps": WARPS}
    affine_bwd_summary_kernel[n, blocks](a, dh, p, g, begin, end, D, **options)
    affine_bwd_states_kernel[N, blocks](p, g, dlast, afters, dstate, offsets, D, **options)
    affine_bwd_kernel[n, blocks](a, h, state, dh, afters, da, db, begin, end, document, offsets, D, **options)
    return da, db, dstate


@affine_bwd.register_fake
def _(dh, dlast, a, h, state, begin, end, document, offsets):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, h, state))


def _save(ctx, inputs, output) -> None:
    a, _, state, *table = inputs
    ctx.save_for_backward(a, output[0], state, *table)


@first_order("affine_scan")
def _backward(ctx, dh, dlast):
    return *affine_bwd(dh, dlast, *ctx.saved_tensors), None, None, None, None


affine_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.affine_fwd)
def _flops(a_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations a number, and three for the elements of the chunks."""
    B, T, D = a_shape
    return 5 * B * T * D


@register_flop_formula(torch.ops.zoo.affine_bwd)
def _flops_bwd(dh_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D = dh_shape
    return 6 * B * T * D


def compile_cases() -> list[KernelCase]:
    """bfloat16 and float32; widths are run-time arguments."""
    cases = []
    for dtype in ("bf16", "fp32"):
        types = dict.fromkeys(("a_ptr", "b_ptr", "h_ptr", "dh_ptr", "da_ptr", "db_ptr"), f"*{dtype}") | {"D": "i32"}
        types |= dict.fromkeys(("begin_ptr", "end_ptr", "document_ptr", "offsets_ptr"), "*i64")
        for kernel in (
            affine_fwd_summary_kernel,
            affine_fwd_states_kernel,
            affine_fwd_kernel,
            affine_bwd_summary_kernel,
            affine_bwd_states_kernel,
            affine_bwd_kernel,
        ):
            signature = {x: types.get(x, "*fp32") for x in kernel.arg_names if x != "BLOCK_D"}
            cases.append(KernelCase(kernel, signature, {"BLOCK_D": BLOCK_D}, num_warps=WARPS, label=dtype))
    return cases
