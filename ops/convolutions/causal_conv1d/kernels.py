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
UNROLLED = tl.constexpr(8)  # taps: more run in a loop; unrolled, 17 taps spill 2 to 7 KiB on sm_80 and sm_90
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
def _tap(x_ptr, state_ptr, begin, back, halo, before, i_doc, o_t, o_d, m_t, m_d, D):
    """Inputs `back` tokens before those of a chunk; tokens before the document's start come from the state.

    halo: the state's rows, (W - 1) * dilation; `before` is clamped to it. Where a chunk and a document lie is int64,
    and so are shifts by whole tokens; offsets inside a chunk fit int32.
    """
    inside = o_t - back >= -before
    x_ptr += (begin - back) * D
    b_x = tl.load(x_ptr + o_t[:, None] * D + o_d[None, :], mask=(m_t & inside)[:, None] & m_d[None, :], other=0.0)
    first = halo - back + before  # row of the state that the chunk's first token would meet
    m_s = (m_t & (o_t + first < halo))[:, None] & m_d[None, :]
    state_ptr += (i_doc * halo + first) * D
    b_s = tl.load(state_ptr + o_t[:, None] * D + o_d[None, :], mask=m_s, other=0.0)
    return b_x.to(tl.float32) + b_s.to(tl.float32)  # disjoint masks: one of the two is zero


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr,  # (B*T, D), (D, W), (D,), (N, R, D), (B*T, D)
    begin_ptr, end_ptr, document_ptr, offsets_ptr,
    D, dilation, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The outputs (tokens, channels) of one chunk and one block of channels."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, _after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    halo = (W - 1) * dilation
    before = tl.minimum(before, halo).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < length
    b_y = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    STEP: tl.constexpr = W if W <= UNROLLED else 1
    for first in range(0, W, STEP):
        for w in tl.static_range(STEP):
            b_w = tl.load(weight_ptr + o_d * W + (first + w), mask=m_d, other=0.0).to(tl.float32)
            back = (W - 1 - w - first) * dilation
            b_y += _tap(x_ptr, state_ptr, begin, back, halo, before, i_doc, o_t, o_d, m_t, m_d, D) * b_w[None, :]
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
    D, dilation, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the values before SiLU for one chunk, and the chunk's sums for weight and bias."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, _after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    halo = (W - 1) * dilation
    before = tl.minimum(before, halo).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < length
    m = m_t[:, None] & m_d[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    b_dz = tl.load(dy_ptr + begin * D + o, mask=m, other=0.0).to(tl.float32)
    STEP: tl.constexpr = W if W <= UNROLLED else 1
    if SILU:  # z again, instead of keeping it
        b_z = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for first in range(0, W, STEP):
            for w in tl.static_range(STEP):
                b_w = tl.load(weight_ptr + o_d * W + (first + w), mask=m_d, other=0.0).to(tl.float32)
                back = (W - 1 - w - first) * dilation
                b_z += _tap(x_ptr, state_ptr, begin, back, halo, before, i_doc, o_t, o_d, m_t, m_d, D) * b_w[None, :]
        if HAS_BIAS:
            b_z += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_sig = tl.sigmoid(b_z)
        b_dz = b_dz * b_sig * (1.0 + b_z * (1.0 - b_sig))
    tl.store(dz_ptr + begin * D + o, b_dz, mask=m)
    for first in range(0, W, STEP):
        for w in tl.static_range(STEP):
            back = (W - 1 - w - first) * dilation
            b_x = _tap(x_ptr, state_ptr, begin, back, halo, before, i_doc, o_t, o_d, m_t, m_d, D)
            tl.store(dweight_ptr + (i_c * W + first + w) * D + o_d, tl.sum(b_dz * b_x, axis=0), mask=m_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + i_c * D + o_d, tl.sum(b_dz, axis=0), mask=m_d)


@triton.jit
def causal_conv1d_bwd_input_kernel(
    weight_ptr, dz_ptr, dx_ptr, dstate_ptr,  # (D, W), (B*T, D) fp32, (B*T, D), (N, R, D) zeros on entry
    begin_ptr, end_ptr, document_ptr, offsets_ptr,
    D, dilation, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk's inputs; the chunks of a document share the rows of its state among them."""
    i_c = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin, length, before, after, i_doc = _locate(begin_ptr, end_ptr, document_ptr, offsets_ptr, i_c)
    halo = (W - 1) * dilation
    tokens = tl.minimum(before + after, halo).to(tl.int32)  # those of the document that a state reaches
    after = tl.minimum(after, BLOCK_T + halo).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m = (o_t < length)[:, None] & m_d[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    b_dx = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    STEP: tl.constexpr = W if W <= UNROLLED else 1
    for nearest in range(0, W, STEP):  # x_t reaches the outputs t, t + dilation ... t + halo of its document
        for d in tl.static_range(STEP):
            b_w = tl.load(weight_ptr + o_d * W + (W - 1 - d - nearest), mask=m_d, other=0.0).to(tl.float32)
            ahead = (nearest + d) * dilation
            reach = m & (o_t + ahead < after)[:, None]
            b_dx += tl.load(dz_ptr + (begin + ahead) * D + o, mask=reach, other=0.0) * b_w[None, :]
    tl.store(dx_ptr + begin * D + o, b_dx.to(dx_ptr.dtype.element_ty), mask=m)
    first = tl.load(offsets_ptr + i_doc)
    chunks = (tl.load(offsets_ptr + i_doc + 1) - first).to(tl.int32)
    dz_ptr += (begin - before) * D  # the document's first token
    for r in range((i_c - first).to(tl.int32) * BLOCK_T, halo, chunks * BLOCK_T):
        m_r = (r + o_t < halo)[:, None] & m_d[None, :]
        b_ds = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for nearest in range(0, W, STEP):  # row r of the state is halo - r tokens before the document's start
            for d in tl.static_range(STEP):
                b_w = tl.load(weight_ptr + o_d * W + (W - 1 - d - nearest), mask=m_d, other=0.0).to(tl.float32)
                to = r - halo + (nearest + d) * dilation
                reach = m_r & ((o_t + to >= 0) & (o_t + to < tokens))[:, None]
                b_ds += tl.load(dz_ptr + to.to(tl.int64) * D + o, mask=reach, other=0.0) * b_w[None, :]
        o_row = (i_doc * halo + r) * D + o
        tl.store(dstate_ptr + o_row, b_ds.to(dstate_ptr.dtype.element_ty), mask=m_r)


@torch.library.custom_op("zoo::causal_conv1d_fwd", mutates_args=())
@dispatch.on_its_device
def causal_conv1d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor, silu: bool, dilation: int,
) -> Tensor:  # fmt: skip
    """x (B, T, D), state (N, R, D), the fields of a ChunkTable of BLOCK_T -> y (B, T, D)."""
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    y, (D, W) = torch.empty_like(x), weight.shape
    grid = (begin.shape[0], triton.cdiv(D, BLOCK_D))
    if begin.shape[0]:
        causal_conv1d_fwd_kernel[grid](
            x, weight, weight if bias is None else bias.contiguous(), state, y, begin, end, document, offsets,
            D, dilation, W=W, HAS_BIAS=bias is not None, SILU=silu, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return y


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, state, begin, end, document, offsets, silu, dilation):
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::causal_conv1d_bwd", mutates_args=())
@dispatch.on_its_device
def causal_conv1d_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor, silu: bool, dilation: int,
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
            D, dilation, W=W, HAS_BIAS=bias is not None, SILU=silu, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
            num_warps=WEIGHT_WARPS,
        )  # fmt: skip
        causal_conv1d_bwd_input_kernel[grid](
            weight, dz, dx, dstate, begin, end, document, offsets,
            D, dilation, W=W, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return dx, dweight.sum(0).T.to(weight.dtype), dbias.sum(0).to(bias_.dtype), dstate


@causal_conv1d_bwd.register_fake
def _(dy, x, weight, bias, state, begin, end, document, offsets, silu, dilation):
    D, W = weight.shape
    return x.new_empty(x.shape), weight.new_empty(W, D).T, weight.new_empty(D), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


@first_order("causal_conv1d")
def _backward(ctx, dy):
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    dx, dweight, dbias, dstate = causal_conv1d_bwd(dy, *saved, ctx.silu, ctx.dilation)
    return dx, dweight, None if saved[2] is None else dbias, dstate, None, None, None, None, None, None


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
    """What the published models launch: width 4 and SiLU, and TCNCA's 17 taps far apart; bfloat16 and float32."""
    short = {"W": 4, "dilation": 1, "HAS_BIAS": False}
    wide = {"W": 17, "HAS_BIAS": True}
    return [case for dtype in ("bf16", "fp32") for sizes in (short, wide) for case in _cases(dtype, sizes)]


def _cases(dtype: str, sizes: dict[str, int]) -> list[KernelCase]:
    """The three kernels at one dtype and size; a dilation that is not said is an argument."""
    io = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "state_ptr"), f"*{dtype}")
    table = _TABLE if "dilation" in sizes else _TABLE | {"dilation": "i32"}
    flags = {**sizes, "SILU": True, **_BLOCKS}
    partial = {"dz_ptr": "*fp32", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
    back = {"weight_ptr": f"*{dtype}", "dz_ptr": "*fp32", "dx_ptr": f"*{dtype}", "dstate_ptr": f"*{dtype}"}
    plain = {name: value for name, value in flags.items() if name not in ("HAS_BIAS", "SILU")}
    return [
        KernelCase(causal_conv1d_fwd_kernel, io | {"y_ptr": f"*{dtype}"} | table, flags),
        KernelCase(
            causal_conv1d_bwd_weight_kernel, io | {"dy_ptr": f"*{dtype}"} | partial | table, flags, WEIGHT_WARPS
        ),
        KernelCase(causal_conv1d_bwd_input_kernel, back | table, plain),
    ]
