"""Triton kernels of the scan of 2x2 blocks, forward and backward, on planes.

The same three launches each way as the elementwise scan: chunks of time side by side, each from a zero state; the
chunks' elements one after the other; the chunks again, each from its own state. `a01` is the entry of row 0 and column
1; the planes of A lie `plane` numbers apart, as do those of the inputs.
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
BLOCK_D = 64  # channels of a program
WARPS = 2


@triton.jit
def _block(A_ptr, plane, m_d):
    """The four entries of the blocks of one step."""
    a00 = tl.load(A_ptr, mask=m_d, other=0.0).to(tl.float32)
    a01 = tl.load(A_ptr + plane, mask=m_d, other=0.0).to(tl.float32)
    a10 = tl.load(A_ptr + 2 * plane, mask=m_d, other=0.0).to(tl.float32)
    a11 = tl.load(A_ptr + 3 * plane, mask=m_d, other=0.0).to(tl.float32)
    return a00, a01, a10, a11


@triton.jit
def _pair(x_ptr, plane, m_d):
    return tl.load(x_ptr, mask=m_d, other=0.0).to(tl.float32), tl.load(x_ptr + plane, mask=m_d, other=0.0).to(
        tl.float32
    )


@triton.jit
def _store_pair(x_ptr, plane, x0, x1, m_d):
    tl.store(x_ptr, x0.to(x_ptr.dtype.element_ty), mask=m_d)
    tl.store(x_ptr + plane, x1.to(x_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def block_affine_fwd_summary_kernel(
    A_ptr, b_ptr, M_ptr, g_ptr,  # (2, 2, B*T, D), (2, B*T, D), (2, 2, G, D) fp32, (2, G, D) fp32
    begin_ptr, end_ptr, plane, chunks, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each chunk does to any state: h -> M h + g."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_c * 0  # int64, whatever the launcher made of it
    begin = tl.load(begin_ptr + i_c)
    A_ptr += begin * D + o_d
    b_ptr += begin * D + o_d
    p00 = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    p01 = tl.zeros([BLOCK_D], dtype=tl.float32)
    p10 = tl.zeros([BLOCK_D], dtype=tl.float32)
    p11 = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    g0 = tl.zeros([BLOCK_D], dtype=tl.float32)
    g1 = tl.zeros([BLOCK_D], dtype=tl.float32)
    for _ in range((tl.load(end_ptr + i_c) - begin).to(tl.int32)):
        a00, a01, a10, a11 = _block(A_ptr, plane, m_d)
        b0, b1 = _pair(b_ptr, plane, m_d)
        p00, p10 = a00 * p00 + a01 * p10, a10 * p00 + a11 * p10
        p01, p11 = a00 * p01 + a01 * p11, a10 * p01 + a11 * p11
        g0, g1 = a00 * g0 + a01 * g1 + b0, a10 * g0 + a11 * g1 + b1
        A_ptr += D
        b_ptr += D
    M_ptr += i_c * D + o_d
    plane_g = (i_c * 0 + chunks) * D
    _store_pair(M_ptr, plane_g, p00, p01, m_d)
    _store_pair(M_ptr + 2 * plane_g, plane_g, p10, p11, m_d)
    _store_pair(g_ptr + i_c * D + o_d, plane_g, g0, g1, m_d)


@triton.jit
def block_affine_states_kernel(
    M_ptr, g_ptr, state_ptr, between_ptr, last_ptr,  # (2, 2, G, D), (2, G, D), (2, N, D), (2, G, D), (2, N, D), fp32
    offsets_ptr, chunks, documents, D, BACKWARDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The value before each chunk of a document, in the order of the walk, and the one after the last."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    first, stop = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    begin = first
    step = D
    if BACKWARDS:
        begin = stop - 1
        step = -D
    plane, plane_n = (i_n * 0 + chunks) * D, (i_n * 0 + documents) * D
    M_ptr += begin * D + o_d
    g_ptr += begin * D + o_d
    between_ptr += begin * D + o_d
    h0, h1 = _pair(state_ptr + i_n * D + o_d, plane_n, m_d)
    for _ in range((stop - first).to(tl.int32)):
        _store_pair(between_ptr, plane, h0, h1, m_d)
        p00, p01, p10, p11 = _block(M_ptr, plane, m_d)
        g0, g1 = _pair(g_ptr, plane, m_d)
        h0, h1 = p00 * h0 + p01 * h1 + g0, p10 * h0 + p11 * h1 + g1
        M_ptr += step
        g_ptr += step
        between_ptr += step
    _store_pair(last_ptr + i_n * D + o_d, plane_n, h0, h1, m_d)


@triton.jit
def block_affine_fwd_kernel(
    A_ptr, b_ptr, starts_ptr, h_ptr,  # (2, 2, B*T, D), (2, B*T, D), (2, G, D) fp32, (2, B*T, D)
    begin_ptr, end_ptr, plane, chunks, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states of one chunk and one block of channels, from the state before the chunk."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_c * 0  # int64, whatever the launcher made of it
    begin = tl.load(begin_ptr + i_c)
    A_ptr += begin * D + o_d
    b_ptr += begin * D + o_d
    h_ptr += begin * D + o_d
    h0, h1 = _pair(starts_ptr + i_c * D + o_d, (i_c * 0 + chunks) * D, m_d)
    for _ in range((tl.load(end_ptr + i_c) - begin).to(tl.int32)):
        a00, a01, a10, a11 = _block(A_ptr, plane, m_d)
        b0, b1 = _pair(b_ptr, plane, m_d)
        h0, h1 = a00 * h0 + a01 * h1 + b0, a10 * h0 + a11 * h1 + b1
        _store_pair(h_ptr, plane, h0, h1, m_d)
        A_ptr += D
        b_ptr += D
        h_ptr += D


@triton.jit
def block_affine_bwd_summary_kernel(
    A_ptr, dh_ptr, M_ptr, g_ptr,  # (2, 2, B*T, D), (2, B*T, D), (2, 2, G, D) fp32, (2, G, D) fp32
    begin_ptr, end_ptr, plane, chunks, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each chunk does to the gradient of the state after it, on its way to the state before it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_c * 0  # int64, whatever the launcher made of it
    end = tl.load(end_ptr + i_c)
    A_ptr += (end - 1) * D + o_d
    dh_ptr += (end - 1) * D + o_d
    p00 = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    p01 = tl.zeros([BLOCK_D], dtype=tl.float32)
    p10 = tl.zeros([BLOCK_D], dtype=tl.float32)
    p11 = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    g0 = tl.zeros([BLOCK_D], dtype=tl.float32)
    g1 = tl.zeros([BLOCK_D], dtype=tl.float32)
    for _ in range((end - tl.load(begin_ptr + i_c)).to(tl.int32)):
        a00, a10, a01, a11 = _block(A_ptr, plane, m_d)  # transposed
        y0, y1 = _pair(dh_ptr, plane, m_d)
        g0 += y0
        g1 += y1
        p00, p10 = a00 * p00 + a01 * p10, a10 * p00 + a11 * p10
        p01, p11 = a00 * p01 + a01 * p11, a10 * p01 + a11 * p11
        g0, g1 = a00 * g0 + a01 * g1, a10 * g0 + a11 * g1
        A_ptr -= D
        dh_ptr -= D
    M_ptr += i_c * D + o_d
    plane_g = (i_c * 0 + chunks) * D
    _store_pair(M_ptr, plane_g, p00, p01, m_d)
    _store_pair(M_ptr + 2 * plane_g, plane_g, p10, p11, m_d)
    _store_pair(g_ptr + i_c * D + o_d, plane_g, g0, g1, m_d)


@triton.jit
def block_affine_bwd_kernel(
    A_ptr, h_ptr, state_ptr, dh_ptr, afters_ptr,  # (2, 2, B*T, D), (2, B*T, D), (2, N, D), (2, B*T, D), (2, G, D)
    dA_ptr, db_ptr,  # (2, 2, B*T, D), (2, B*T, D)
    begin_ptr, end_ptr, document_ptr, offsets_ptr, plane, chunks, documents, D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of A and b in one chunk, walked against time from the gradient after it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    plane += i_c * 0  # int64, whatever the launcher made of it
    end = tl.load(end_ptr + i_c)
    i_n = tl.load(document_ptr + i_c)
    A_ptr += (end - 1) * D + o_d
    h_ptr += (end - 2) * D + o_d  # the state before the step
    dh_ptr += (end - 1) * D + o_d
    dA_ptr += (end - 1) * D + o_d
    db_ptr += (end - 1) * D + o_d
    d0, d1 = _pair(afters_ptr + i_c * D + o_d, (i_c * 0 + chunks) * D, m_d)
    for _ in range((end - tl.load(begin_ptr + i_c)).to(tl.int32) - 1):
        y0, y1 = _pair(dh_ptr, plane, m_d)
        h0, h1 = _pair(h_ptr, plane, m_d)
        d0 += y0
        d1 += y1
        _store_pair(dA_ptr, plane, d0 * h0, d0 * h1, m_d)
        _store_pair(dA_ptr + 2 * plane, plane, d1 * h0, d1 * h1, m_d)
        _store_pair(db_ptr, plane, d0, d1, m_d)
        a00, a01, a10, a11 = _block(A_ptr, plane, m_d)
        d0, d1 = a00 * d0 + a10 * d1, a01 * d0 + a11 * d1
        A_ptr -= D
        h_ptr -= D
        dh_ptr -= D
        dA_ptr -= D
        db_ptr -= D
    # the chunk's first step, whose past is in the document's state or in h: disjoint masks, one of the two is zero
    is_first = i_c + o_d * 0 == tl.load(offsets_ptr + i_n)
    s0, s1 = _pair(state_ptr + i_n * D + o_d, (i_c * 0 + documents) * D, m_d & is_first)
    h0, h1 = _pair(h_ptr, plane, m_d & (is_first == 0))
    h0 += s0
    h1 += s1
    y0, y1 = _pair(dh_ptr, plane, m_d)
    d0 += y0
    d1 += y1
    _store_pair(dA_ptr, plane, d0 * h0, d0 * h1, m_d)
    _store_pair(dA_ptr + 2 * plane, plane, d1 * h0, d1 * h1, m_d)
    _store_pair(db_ptr, plane, d0, d1, m_d)


def _elements(state: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for M (2, 2, G, D), g and the states between chunks (2, G, D), float32."""
    D = state.shape[2]
    return state.new_empty(2, 2, n, D), state.new_empty(2, n, D), state.new_empty(2, n, D)


@torch.library.custom_op("zoo::block_affine_fwd", mutates_args=())
@dispatch.on_its_device
def block_affine_fwd(
    A: Tensor, b: Tensor, state: Tensor, begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """A (2, 2, B, T, D), b (2, B, T, D), state (2, N, D) float32, a ChunkTable of CHUNK -> h (2, B, T, D), last."""
    A, b, state = A.contiguous(), b.contiguous(), state.contiguous()
    (_, N, D), n, h, last = state.shape, begin.shape[0], torch.empty_like(b), torch.empty_like(state)
    M, g, starts = _elements(state, n)
    plane, blocks, options = b[0].numel(), triton.cdiv(D, BLOCK_D), {"BLOCK_D": BLOCK_D, "num_warps": WARPS}
    block_affine_fwd_summary_kernel[n, blocks](A, b, M, g, begin, end, plane, n, D, **options)
    block_affine_states_kernel[N, blocks](M, g, state, starts, last, offsets, n, N, D, BACKWARDS=False, **options)
    block_affine_fwd_kernel[n, blocks](A, b, starts, h, begin, end, plane, n, D, **options)
    return h, last


@block_affine_fwd.register_fake
def _(A, b, state, begin, end, document, offsets):
    return b.new_empty(b.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::block_affine_bwd", mutates_args=())
@dispatch.on_its_device
def block_affine_bwd(
    dh: Tensor, dlast: Tensor, A: Tensor, h: Tensor, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of A, b and state."""
    dh, dlast, A, h, state = (x.contiguous() for x in (dh, dlast, A, h, state))
    (_, N, D), n = state.shape, begin.shape[0]
    M, g, afters = _elements(state, n)
    dA, db, dstate = torch.empty_like(A), torch.empty_like(h), torch.empty_like(state)
    plane, blocks, options = h[0].numel(), triton.cdiv(D, BLOCK_D), {"BLOCK_D": BLOCK_D, "num_warps": WARPS}
    block_affine_bwd_summary_kernel[n, blocks](A, dh, M, g, begin, end, plane, n, D, **options)
    block_affine_states_kernel[N, blocks](M, g, dlast, afters, dstate, offsets, n, N, D, BACKWARDS=True, **options)
    block_affine_bwd_kernel[n, blocks](
        A, h, state, dh, afters, dA, db, begin, end, document, offsets, plane, n, N, D, **options
    )
    return dA, db, dstate


@block_affine_bwd.register_fake
def _(dh, dlast, A, h, state, begin, end, document, offsets):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (A, h, state))


def _save(ctx, inputs, output) -> None:
    A, _, state, *table = inputs
    ctx.save_for_backward(A, output[0], state, *table)


@first_order("block_affine_scan")
def _backward(ctx, dh, dlast):
    return *block_affine_bwd(dh, dlast, *ctx.saved_tensors), None, None, None, None


block_affine_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.block_affine_fwd)
def _flops(A_shape, *args, out_shape=None, **kwargs) -> int:
    """Eight operations a channel, and twenty for the elements of the chunks."""
    _, _, B, T, D = A_shape
    return 28 * B * T * D


@register_flop_formula(torch.ops.zoo.block_affine_bwd)
def _flops_bwd(dh_shape, *args, out_shape=None, **kwargs) -> int:
    _, B, T, D = dh_shape
    return 32 * B * T * D


def compile_cases() -> list[KernelCase]:
    """bfloat16 and float32; widths are run-time arguments."""
    cases = []
    for dtype in ("bf16", "fp32"):
        types = dict.fromkeys(("A_ptr", "b_ptr", "h_ptr", "dh_ptr", "dA_ptr", "db_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("begin_ptr", "end_ptr", "document_ptr", "offsets_ptr"), "*i64")
        types |= dict.fromkeys(("chunks", "documents", "D"), "i32") | {"plane": "i64"}
        for kernel, own in (
            (block_affine_fwd_summary_kernel, {}),
            (block_affine_states_kernel, {"BACKWARDS": False}),
            (block_affine_states_kernel, {"BACKWARDS": True}),
            (block_affine_fwd_kernel, {}),
            (block_affine_bwd_summary_kernel, {}),
            (block_affine_bwd_kernel, {}),
        ):
            constants = {"BLOCK_D": BLOCK_D, **own}
            signature = {x: types.get(x, "*fp32") for x in kernel.arg_names if x not in constants}
            cases.append(KernelCase(kernel, signature, constants, num_warps=WARPS, label=dtype))
    return cases
