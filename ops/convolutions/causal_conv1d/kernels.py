"""Triton kernels of the causal depthwise convolution, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

BLOCK_T = 32  # not tuned on a device yet; 64 was close to the 255 registers a thread may have on sm_80
BLOCK_D = 64
WEIGHT_WARPS = 8  # the taps' sums hold W + 2 tiles at once: with 4 warps the backward spills 16 to 64 bytes


@triton.jit
def _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c):
    """A chunk's first token (int64), its length, tokens of its document before it and from it on, the document."""
    i_doc = tl.load(document_ptr + i_c)
    begin = tl.load(begin_ptr + i_c)
    first = tl.load(begin_ptr + tl.load(offsets_ptr + i_doc))
    last = tl.load(end_ptr + tl.load(offsets_ptr + i_doc + 1) - 1)
    return begin, (tl.load(end_ptr + i_c) - begin).to(tl.int32), begin - first, last - begin, i_doc


@triton.jit
def _tap(x_ptr, state_ptr, o_s, before, i_doc, o_d, m_t, m_d, D, W: tl.constexpr):
    """Inputs at chunk-relative tokens o_s; tokens before the document's start come from the state.

    x_ptr is the chunk's first token: addresses are int64 by that shift, offsets inside a chunk fit int32. `before` is
    clamped to W, which is as far as a tap reaches.
    """
    inside = o_s >= -before
    b_x = tl.load(x_ptr + o_s[:, None] * D + o_d[None, :], mask=(m_t & inside)[:, None] & m_d[None, :], other=0.0)
    row = (W - 1) + o_s + before  # of the state
    m_s = (m_t & (row < W - 1))[:, None] & m_d[None, :]
    b_s = tl.load(state_ptr + i_doc * (W - 1) * D + row[:, None] * D + o_d[None, :], mask=m_s, other=0.0)
    return b_x.to(tl.float32) + b_s.to(tl.float32)  # disjoint masks: one of the two is zero


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr,  # (B*T, D), (D, W), (D,), (N, W-1, D), (B*T, D)
    begin_ptr, end_ptr, document_ptr, offsets_ptr,
    D, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The outputs (tokens, channels) of one chunk and one block of channels."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, _after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    before = tl.minimum(before, W).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < length
    b_y = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for w in tl.static_range(W):
        b_w = tl.load(weight_ptr + o_d * W + w, mask=m_d, other=0.0).to(tl.float32)
        b_y += _tap(x_ptr + begin * D, state_ptr, o_t - (W - 1 - w), before, i_doc, o_d, m_t, m_d, D, W) * b_w[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    o = o_t[:, None] * D + o_d[None, :]
    tl.store(y_ptr + begin * D + o, b_y.to(y_ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def causal_conv1d_bwd_weight_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, dy_ptr,
    dz_ptr, dweight_ptr, dbias_ptr,  # (B*T, D) fp32, (G, W, D) fp32, (G, D) fp32: sums over one chunk each
    begin_ptr, end_ptr, document_ptr, offsets_ptr,
    D, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the values before SiLU for one chunk, and the chunk's sums for weight and bias."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, _after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    before = tl.minimum(before, W).to(tl.int32)
    x_ptr += begin * D
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < length
    m = m_t[:, None] & m_d[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    b_dz = tl.load(dy_ptr + begin * D + o, mask=m, other=0.0).to(tl.float32)
    if SILU:  # z again, instead of keeping it
        b_z = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for w in tl.static_range(W):
            b_w = tl.load(weight_ptr + o_d * W + w, mask=m_d, other=0.0).to(tl.float32)
            b_z += _tap(x_ptr, state_ptr, o_t - (W - 1 - w), before, i_doc, o_d, m_t, m_d, D, W) * b_w[None, :]
        if HAS_BIAS:
            b_z += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_sig = tl.sigmoid(b_z)
        b_dz = b_dz * b_sig * (1.0 + b_z * (1.0 - b_sig))
    tl.store(dz_ptr + begin * D + o, b_dz, mask=m)
    for w in tl.static_range(W):
        b_x = _tap(x_ptr, state_ptr, o_t - (W - 1 - w), before, i_doc, o_d, m_t, m_d, D, W)
        tl.store(dweight_ptr + (i_c * W + w) * D + o_d, tl.sum(b_dz * b_x, axis=0), mask=m_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + i_c * D + o_d, tl.sum(b_dz, axis=0), mask=m_d)


@triton.jit
def causal_conv1d_bwd_input_kernel(
    weight_ptr, dz_ptr, dx_ptr, dstate_ptr,  # (D, W), (B*T, D) fp32, (B*T, D), (N, W-1, D) zeros on entry
    begin_ptr, end_ptr, document_ptr, offsets_ptr,
    D, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk's inputs; a document's first chunk also gives that of its state."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    after = tl.minimum(after, BLOCK_T + W).to(tl.int32)
    dz_ptr += begin * D
    o_t = tl.arange(0, BLOCK_T)
    m = (o_t < length)[:, None] & m_d[None, :]
    b_dx = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for d in tl.static_range(W):  # x_t reaches the outputs t ... t + W - 1 of its document
        b_w = tl.load(weight_ptr + o_d * W + (W - 1 - d), mask=m_d, other=0.0).to(tl.float32)
        reach = m & (o_t + d < after)[:, None]
        b_dx += tl.load(dz_ptr + (o_t + d)[:, None] * D + o_d[None, :], mask=reach, other=0.0) * b_w[None, :]
    tl.store(dx_ptr + begin * D + o_t[:, None] * D + o_d[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m)
    if before == 0:
        for r in tl.static_range(W - 1):  # row r of the state is W - 1 - r tokens before the document's start
            b_ds = tl.zeros([BLOCK_D], dtype=tl.float32)
            for d in tl.static_range(W - 1 - r, W):
                b_w = tl.load(weight_ptr + o_d * W + (W - 1 - d), mask=m_d, other=0.0).to(tl.float32)
                o_s = o_d * 0 + (d - (W - 1 - r))
                b_ds += tl.load(dz_ptr + o_s * D + o_d, mask=m_d & (o_s < after), other=0.0) * b_w
            o_row = (i_doc * (W - 1) + r) * D + o_d
            tl.store(dstate_ptr + o_row, b_ds.to(dstate_ptr.dtype.element_ty), mask=m_d)


@torch.library.custom_op("zoo::causal_conv1d_fwd", mutates_args=())
@dispatch.on_its_device
def causal_conv1d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor, silu: bool,
) -> Tensor:  # fmt: skip
    """x (B, T, D), state (N, W-1, D), the fields of a ChunkTable of BLOCK_T -> y (B, T, D)."""
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    y, (D, W) = torch.empty_like(x), weight.shape
    grid = (begin.shape[0], triton.cdiv(D, BLOCK_D))
    if begin.shape[0]:
        causal_conv1d_fwd_kernel[grid](
            x, weight, weight if bias is None else bias.contiguous(), state, y, begin, end, document, offsets,
            D, W=W, HAS_BIAS=bias is not None, SILU=silu, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return y


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, state, begin, end, document, offsets, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::causal_conv1d_bwd", mutates_args=())
@dispatch.on_its_device
def causal_conv1d_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias (zeros (D,) without one) and state."""
    dy, x, weight, state = dy.contiguous(), x.contiguous(), weight.contiguous(), state.contiguous()
    (D, W), n = weight.shape, begin.shape[0]
    bias_ = weight if bias is None else bias.contiguous()
    dz = torch.empty_like(x, dtype=torch.float32)
    dx, dstate = torch.empty_like(x), torch.zeros_like(state)
    dweight = torch.empty(n, W, D, dtype=torch.float32, device=x.device)
    dbias = torch.zeros(n, D, dtype=torch.float32, device=x.device)
    grid = (n, triton.cdiv(D, BLOCK_D))
    if n:
        causal_conv1d_bwd_weight_kernel[grid](
            x, weight, bias_, state, dy, dz, dweight, dbias, begin, end, document, offsets,
            D, W=W, HAS_BIAS=bias is not None, SILU=silu, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=WEIGHT_WARPS,
        )  # fmt: skip
        causal_conv1d_bwd_input_kernel[grid](
            weight, dz, dx, dstate, begin, end, document, offsets, D, W=W, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D
        )
    return dx, dweight.sum(0).T.to(weight.dtype), dbias.sum(0).to(bias_.dtype), dstate


@causal_conv1d_bwd.register_fake
def _(dy, x, weight, bias, state, begin, end, document, offsets, silu):
    D, W = weight.shape
    return x.new_empty(x.shape), weight.new_empty(W, D).T, weight.new_empty(D), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


@first_order("causal_conv1d")
def _backward(ctx, dy):
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    dx, dweight, dbias, dstate = causal_conv1d_bwd(dy, *saved, ctx.silu)
    return dx, dweight, None if saved[2] is None else dbias, dstate, None, None, None, None, None


causal_conv1d_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.causal_conv1d_fwd)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D = x_shape
    return 2 * B * T * D * weight_shape[1]


@register_flop_formula(torch.ops.zoo.causal_conv1d_bwd)
def _flops_bwd(dy_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, D = x_shape
    return 4 * B * T * D * weight_shape[1]


_TABLE = {"begin_ptr": "*i64", "end_ptr": "*i64", "document_ptr": "*i64", "offsets_ptr": "*i64", "D": "i32"}
_BLOCKS = {"BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}


def compile_cases() -> list[KernelCase]:
    """What the published models launch: width 4 and SiLU, without a bias, in bfloat16 and float32."""
    cases = []
    for dtype in ("bf16", "fp32"):
        io = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "state_ptr"), f"*{dtype}")
        flags = {"W": 4, "HAS_BIAS": False, "SILU": True, **_BLOCKS}
        partial = {"dz_ptr": "*fp32", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
        cases += [
            KernelCase(causal_conv1d_fwd_kernel, io | {"y_ptr": f"*{dtype}"} | _TABLE, flags),
            KernelCase(
                causal_conv1d_bwd_weight_kernel, io | {"dy_ptr": f"*{dtype}"} | partial | _TABLE, flags, WEIGHT_WARPS
            ),
            KernelCase(
                causal_conv1d_bwd_input_kernel,
                {"weight_ptr": f"*{dtype}", "dz_ptr": "*fp32", "dx_ptr": f"*{dtype}", "dstate_ptr": f"*{dtype}"}
                | _TABLE,
                {"W": 4, **_BLOCKS},
            ),
        ]
    return cases
