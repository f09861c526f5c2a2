"""Triton kernels of the complex affine scan, forward and backward, on pairs of real numbers.

The same three launches each way as the elementwise scan: chunks of time side by side, each from a zero state; the
chunks' elements one after the other; the chunks again, each from its own state. Transitions that do not change in time
are read as one row and never written out, and a reset multiplies them by 0 where it stands.
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
BLOCK_D = 64  # complex channels of a program
WARPS = 2


@triton.jit
def _pair(x_ptr, m_d):
    """Real and imaginary parts of a row; loads of one are the other's neighbours."""
    re = tl.load(x_ptr, mask=m_d, other=0.0).to(tl.float32)
    return re, tl.load(x_ptr + 1, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def _store(x_ptr, re, im, m_d):
    tl.store(x_ptr, re.to(x_ptr.dtype.element_ty), mask=m_d)
    tl.store(x_ptr + 1, im.to(x_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _times(x_re, x_im, y_re, y_im):
    return x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re


@triton.jit
def complex_affine_summary_kernel(
    a_ptr, x_ptr, keep_ptr, p_ptr, g_ptr,  # (B*T or 1, D, 2), (B*T, D, 2), (B*T,), (G, D, 2) fp32 twice
    begin_ptr, end_ptr, D, CONSTANT: tl.constexpr, RESETS: tl.constexpr, BACKWARDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each chunk does to any state, h -> p h + g; backwards, to the gradient that comes from after it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, end = tl.load(begin_ptr + i_c), tl.load(end_ptr + i_c)
    first = begin
    if BACKWARDS:
        first = end - 1
    step = 2 * D
    if BACKWARDS:
        step = -2 * D
    x_ptr += first * 2 * D + 2 * o_d
    keep_ptr += first
    if CONSTANT:
        a_ptr += 2 * o_d
    else:
        a_ptr += first * 2 * D + 2 * o_d
    p_re = tl.full([BLOCK_D], 1.0, dtype=tl.float32)
    p_im = tl.zeros([BLOCK_D], dtype=tl.float32)
    g_re = tl.zeros([BLOCK_D], dtype=tl.float32)
    g_im = tl.zeros([BLOCK_D], dtype=tl.float32)
    for _ in range((end - begin).to(tl.int32)):
        a_re, a_im = _pair(a_ptr, m_d)
        if RESETS:
            keep = tl.load(keep_ptr).to(tl.float32)
            a_re *= keep
            a_im *= keep
        x_re, x_im = _pair(x_ptr, m_d)
        if BACKWARDS:
            a_im = -a_im
            g_re, g_im = _times(a_re, a_im, g_re + x_re, g_im + x_im)
        else:
            g_re, g_im = _times(a_re, a_im, g_re, g_im)
            g_re += x_re
            g_im += x_im
        p_re, p_im = _times(a_re, a_im, p_re, p_im)
        x_ptr += step
        if not CONSTANT:
            a_ptr += step
        if BACKWARDS:
            keep_ptr -= 1
        else:
            keep_ptr += 1
    _store(p_ptr + (i_c * D + o_d) * 2, p_re, p_im, m_d)
    _store(g_ptr + (i_c * D + o_d) * 2, g_re, g_im, m_d)


@triton.jit
def complex_affine_states_kernel(
    p_ptr, g_ptr, state_ptr, between_ptr, last_ptr,  # (G, D, 2) twice, (N, D, 2), (G, D, 2), (N, D, 2), all fp32
    offsets_ptr, D, BACKWARDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The value before each chunk of a document, in the order of the walk, and the one after the last."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    first, stop = tl.load(offsets_ptr + i_n), tl.load(offsets_ptr + i_n + 1)
    begin = first
    step = 2 * D
    if BACKWARDS:
        begin = stop - 1
        step = -2 * D
    p_ptr += begin * 2 * D + 2 * o_d
    g_ptr += begin * 2 * D + 2 * o_d
    between_ptr += begin * 2 * D + 2 * o_d
    h_re, h_im = _pair(state_ptr + (i_n * D + o_d) * 2, m_d)
    for _ in range((stop - first).to(tl.int32)):
        _store(between_ptr, h_re, h_im, m_d)
        p_re, p_im = _pair(p_ptr, m_d)
        g_re, g_im = _pair(g_ptr, m_d)
        h_re, h_im = _times(p_re, p_im, h_re, h_im)
        h_re += g_re
        h_im += g_im
        p_ptr += step
        g_ptr += step
        between_ptr += step
    _store(last_ptr + (i_n * D + o_d) * 2, h_re, h_im, m_d)


@triton.jit
def complex_affine_fwd_kernel(
    a_ptr, b_ptr, keep_ptr, starts_ptr, h_ptr,  # (B*T or 1, D, 2), (B*T, D, 2), (B*T,), (G, D, 2) fp32, (B*T, D, 2)
    begin_ptr, end_ptr, D, CONSTANT: tl.constexpr, RESETS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states of one chunk and one block of channels, from the state before the chunk."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(begin_ptr + i_c)
    b_ptr += begin * 2 * D + 2 * o_d
    h_ptr += begin * 2 * D + 2 * o_d
    keep_ptr += begin
    if CONSTANT:
        a_ptr += 2 * o_d
    else:
        a_ptr += begin * 2 * D + 2 * o_d
    h_re, h_im = _pair(starts_ptr + (i_c * D + o_d) * 2, m_d)
    for _ in range((tl.load(end_ptr + i_c) - begin).to(tl.int32)):
        a_re, a_im = _pair(a_ptr, m_d)
        if RESETS:
            keep = tl.load(keep_ptr).to(tl.float32)
            a_re *= keep
            a_im *= keep
        b_re, b_im = _pair(b_ptr, m_d)
        h_re, h_im = _times(a_re, a_im, h_re, h_im)
        h_re += b_re
        h_im += b_im
        _store(h_ptr, h_re, h_im, m_d)
        b_ptr += 2 * D
        h_ptr += 2 * D
        keep_ptr += 1
        if not CONSTANT:
            a_ptr += 2 * D


@triton.jit
def complex_affine_bwd_kernel(
    a_ptr, h_ptr, keep_ptr, state_ptr, dh_ptr, afters_ptr,  # as above; (N, D, 2) fp32, (B*T, D, 2), (G, D, 2) fp32
    da_ptr, db_ptr,  # (B*T, D, 2), or da (G, D, 2) fp32 of constant transitions; (B*T, D, 2)
    begin_ptr, end_ptr, document_ptr, offsets_ptr, D,
    CONSTANT: tl.constexpr, RESETS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a and b in one chunk, walked against time from the gradient after it."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, end = tl.load(begin_ptr + i_c), tl.load(end_ptr + i_c)
    i_n = tl.load(document_ptr + i_c)
    h_ptr += (end - 2) * 2 * D + 2 * o_d  # the state before the step
    dh_ptr += (end - 1) * 2 * D + 2 * o_d
    db_ptr += (end - 1) * 2 * D + 2 * o_d
    keep_ptr += end - 1
    if CONSTANT:
        a_ptr += 2 * o_d
        da_ptr += (i_c * D + o_d) * 2
    else:
        a_ptr += (end - 1) * 2 * D + 2 * o_d
        da_ptr += (end - 1) * 2 * D + 2 * o_d
    d_re, d_im = _pair(afters_ptr + (i_c * D + o_d) * 2, m_d)
    s_re = tl.zeros([BLOCK_D], dtype=tl.float32)  # the gradient of constant transitions
    s_im = tl.zeros([BLOCK_D], dtype=tl.float32)
    size = (end - begin).to(tl.int32)
    is_first = i_c + o_d * 0 == tl.load(offsets_ptr + i_n)
    for i in range(size):
        # the past of the chunk's first step is in the document's state or in h: disjoint masks, one of the two is zero
        edge = (o_d * 0 + i) == size - 1
        x_re, x_im = _pair(state_ptr + (i_n * D + o_d) * 2, m_d & edge & is_first)
        h_re, h_im = _pair(h_ptr, m_d & ((edge & is_first) == 0))
        h_re += x_re
        h_im += x_im
        y_re, y_im = _pair(dh_ptr, m_d)
        d_re += y_re
        d_im += y_im
        _store(db_ptr, d_re, d_im, m_d)
        e_re, e_im = _times(d_re, d_im, h_re, -h_im)
        a_re, a_im = _pair(a_ptr, m_d)
        if RESETS:
            keep = tl.load(keep_ptr).to(tl.float32)
            a_re *= keep
            a_im *= keep
            e_re *= keep
            e_im *= keep
        d_re, d_im = _times(a_re, -a_im, d_re, d_im)
        if CONSTANT:
            s_re += e_re
            s_im += e_im
        else:
            _store(da_ptr, e_re, e_im, m_d)
            a_ptr -= 2 * D
            da_ptr -= 2 * D
        h_ptr -= 2 * D
        dh_ptr -= 2 * D
        db_ptr -= 2 * D
        keep_ptr -= 1
    if CONSTANT:
        _store(da_ptr, s_re, s_im, m_d)


def _elements(state: Tensor, n: int) -> list[Tensor]:
    """Room for p, g and the states between chunks, (G, D, 2) float32 each."""
    return [state.new_empty(n, *state.shape[1:]) for _ in range(3)]


def _options(a: Tensor, keep: Tensor) -> dict[str, int | bool]:
    return {"CONSTANT": a.ndim == 2, "RESETS": keep.numel() > 0, "BLOCK_D": BLOCK_D, "num_warps": WARPS}


@torch.library.custom_op("zoo::complex_affine_fwd", mutates_args=())
@dispatch.on_its_device
def complex_affine_fwd(
    a: Tensor, b: Tensor, keep: Tensor, state: Tensor, begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """a (B, T, D, 2) or (D, 2), b (B, T, D, 2), keep (B, T) uint8, 0 at resets, or empty, state (N, D, 2) float32,
    the fields of a ChunkTable of CHUNK -> h (B, T, D, 2), the last states."""
    a, b, keep, state = a.contiguous(), b.contiguous(), keep.contiguous(), state.contiguous()
    (N, D, _), n, h = state.shape, begin.shape[0], torch.empty_like(b)
    p, g, starts = _elements(state, n)
    last, blocks, options = torch.empty_like(state), triton.cdiv(D, BLOCK_D), _options(a, keep)
    complex_affine_summary_kernel[n, blocks](a, b, keep, p, g, begin, end, D, BACKWARDS=False, **options)
    complex_affine_states_kernel[N, blocks](
        p, g, state, starts, last, offsets, D, BACKWARDS=False, BLOCK_D=BLOCK_D, num_warps=WARPS
    )
    complex_affine_fwd_kernel[n, blocks](a, b, keep, starts, h, begin, end, D, **options)
    return h, last


@complex_affine_fwd.register_fake
def _(a, b, keep, state, begin, end, document, offsets):
    return b.new_empty(b.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::complex_affine_bwd", mutates_args=())
@dispatch.on_its_device
def complex_affine_bwd(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, keep: Tensor, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, b and state."""
    dh, dlast, a, h, keep, state = (x.contiguous() for x in (dh, dlast, a, h, keep, state))
    (N, D, _), n = state.shape, begin.shape[0]
    p, g, afters = _elements(state, n)
    constant = a.ndim == 2
    da = state.new_empty(n, D, 2) if constant else torch.empty_like(a)
    db, dstate, blocks, options = (
        torch.empty_like(h),
        torch.empty_like(state),
        triton.cdiv(D, BLOCK_D),
        _options(a, keep),
    )
    complex_affine_summary_kernel[n, blocks](a, dh, keep, p, g, begin, end, D, BACKWARDS=True, **options)
    complex_affine_states_kernel[N, blocks](
        p, g, dlast, afters, dstate, offsets, D, BACKWARDS=True, BLOCK_D=BLOCK_D, num_warps=WARPS
    )
    complex_affine_bwd_kernel[n, blocks](
        a, h, keep, state, dh, afters, da, db, begin, end, document, offsets, D, **options
    )
    return da.sum(0).to(a.dtype) if constant else da, db, dstate


@complex_affine_bwd.register_fake
def _(dh, dlast, a, h, keep, state, begin, end, document, offsets):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, h, state))


def _save(ctx, inputs, output) -> None:
    a, _, keep, state, *table = inputs
    ctx.save_for_backward(a, output[0], keep, state, *table)


@first_order("complex_affine_scan")
def _backward(ctx, dh, dlast):
    da, db, dstate = complex_affine_bwd(dh, dlast, *ctx.saved_tensors)
    return da, db, None, dstate, None, None, None, None


complex_affine_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.complex_affine_fwd)
def _flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """Eight operations a complex number, and fourteen for the elements of the chunks."""
    B, T, D, _ = b_shape
    return 22 * B * T * D


@register_flop_formula(torch.ops.zoo.complex_affine_bwd)
def _flops_bwd(dh_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D, _ = dh_shape
    return 30 * B * T * D


def compile_cases() -> list[KernelCase]:
    """bfloat16 and float32, transitions per step and constant, with and without resets."""
    cases = []
    for dtype, constant, resets in (("bf16", False, True), ("fp32", True, False), ("fp32", True, True)):
        names = ("a_ptr", "b_ptr", "x_ptr", "h_ptr", "dh_ptr", "db_ptr") + (() if constant else ("da_ptr",))
        types = dict.fromkeys(names, f"*{dtype}") | {"D": "i32", "keep_ptr": "*u8"}
        types |= dict.fromkeys(("begin_ptr", "end_ptr", "document_ptr", "offsets_ptr"), "*i64")
        for kernel, backwards in (
            (complex_affine_summary_kernel, False),
            (complex_affine_summary_kernel, True),
            (complex_affine_states_kernel, False),
            (complex_affine_states_kernel, True),
            (complex_affine_fwd_kernel, None),
            (complex_affine_bwd_kernel, None),
        ):
            known = {"CONSTANT": constant, "RESETS": resets, "BACKWARDS": backwards, "BLOCK_D": BLOCK_D}
            constants = {key: value for key, value in known.items() if key in kernel.arg_names}
            signature = {x: types.get(x, "*fp32") for x in kernel.arg_names if x not in constants}
            label = f"{dtype}{' constant' * constant}{' resets' * resets}{' backwards' * bool(backwards)}"
            cases.append(KernelCase(kernel, signature, constants, num_warps=WARPS, label=label))
    return cases
