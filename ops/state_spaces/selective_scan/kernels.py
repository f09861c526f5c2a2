"""Triton kernels of the selective scan, forward and backward.

Three launches each way, so that long sequences fill the device whatever their number: chunks of time side by side,
each from a zero state; the chunks' elements one after the other; the chunks again, each from its own state. States live
in registers, (channels, N) a program; only those between chunks are written, (T / CHUNK, E, N), and kept for the
backward. The last backward kernel needs the state before and the gradient after every step at once: it takes one of the
N states after the other and scans the chunk in both directions, (CHUNK, channels) a program. Sums over channels and
over chunks are of partial results in a fixed order, without atomics: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase

# Not tuned on a device yet. The states between chunks are N / CHUNK times as large as u in float32.
CHUNK = 32
WALK_WARPS = 2
SCAN_WARPS = 8  # with 4 the last backward kernel holds 168 registers and 8 bytes of stack on sm_80


@triton.jit
def _then(a1, b1, a2, b2):
    """h -> a1 h + b1, followed by h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def selective_fwd_summary_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr,  # (B*T, E) twice, (E, N), (B*T, N)
    states_ptr, total_ptr,  # (G, E, N) fp32: what the chunk's inputs leave behind; (G, E) fp32: its sum of delta
    begin_ptr, end_ptr, E, N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one chunk does to any state: what its inputs leave behind, and its sum of delta."""
    i_c = tl.program_id(0).to(tl.int64)
    o_e, o_n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    m_e, m_n = o_e < E, o_n < N
    o_en, m_en = o_e[:, None] * N + o_n[None, :], m_e[:, None] & m_n[None, :]
    begin = tl.load(begin_ptr + i_c)
    b_A = tl.load(A_ptr + o_en, mask=m_en, other=0.0).to(tl.float32)
    u_ptr += begin * E + o_e
    delta_ptr += begin * E + o_e
    B_ptr += begin * N + o_n
    b_h = tl.zeros([BLOCK_E, BLOCK_N], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_E], dtype=tl.float32)
    for _ in range((tl.load(end_ptr + i_c) - begin).to(tl.int32)):
        b_d = tl.load(delta_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_x = b_d * tl.load(u_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_B = tl.load(B_ptr, mask=m_n, other=0.0).to(tl.float32)
        b_h = tl.exp(b_d[:, None] * b_A) * b_h + b_x[:, None] * b_B[None, :]
        b_total += b_d
        u_ptr += E
        delta_ptr += E
        B_ptr += N
    tl.store(states_ptr + i_c * E * N + o_en, b_h, mask=m_en)
    tl.store(total_ptr + i_c * E + o_e, b_total, mask=m_e)


@triton.jit
def selective_fwd_states_kernel(
    A_ptr, total_ptr, state_ptr, states_ptr, last_ptr,  # (E, N), (G, E), (N, E, N), (G, E, N), (N, E, N); fp32 but A
    offsets_ptr, E, N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """In place: what each chunk leaves behind becomes the state before it."""
    i_n = tl.program_id(0).to(tl.int64)
    o_e, o_n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    m_e = o_e < E
    o_en, m_en = o_e[:, None] * N + o_n[None, :], m_e[:, None] & (o_n < N)[None, :]
    first = tl.load(offsets_ptr + i_n)
    b_A = tl.load(A_ptr + o_en, mask=m_en, other=0.0).to(tl.float32)
    total_ptr += first * E + o_e
    states_ptr += first * E * N + o_en
    b_h = tl.load(state_ptr + i_n * E * N + o_en, mask=m_en, other=0.0)
    for _ in range((tl.load(offsets_ptr + i_n + 1) - first).to(tl.int32)):
        b_left = tl.load(states_ptr, mask=m_en, other=0.0)
        b_total = tl.load(total_ptr, mask=m_e, other=0.0)
        tl.store(states_ptr, b_h, mask=m_en)
        b_h = tl.exp(b_total[:, None] * b_A) * b_h + b_left
        total_ptr += E
        states_ptr += E * N
    tl.store(last_ptr + i_n * E * N + o_en, b_h, mask=m_en)


@triton.jit
def selective_fwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr,  # (B*T, E) twice, (E, N), (B*T, N) twice, (E,)
    states_ptr, y_ptr,  # (G, E, N) fp32: before each chunk; (B*T, E)
    begin_ptr, end_ptr,
    E, N: tl.constexpr, HAS_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk and one block of channels, from the state before the chunk."""
    i_c = tl.program_id(0).to(tl.int64)
    o_e, o_n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    m_e, m_n = o_e < E, o_n < N
    o_en, m_en = o_e[:, None] * N + o_n[None, :], m_e[:, None] & m_n[None, :]
    begin = tl.load(begin_ptr + i_c)
    b_A = tl.load(A_ptr + o_en, mask=m_en, other=0.0).to(tl.float32)
    b_h = tl.load(states_ptr + i_c * E * N + o_en, mask=m_en, other=0.0)
    b_D = tl.zeros([BLOCK_E], dtype=tl.float32)
    if HAS_D:
        b_D += tl.load(D_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    u_ptr += begin * E + o_e
    delta_ptr += begin * E + o_e
    y_ptr += begin * E + o_e
    B_ptr += begin * N + o_n
    C_ptr += begin * N + o_n
    for _ in range((tl.load(end_ptr + i_c) - begin).to(tl.int32)):
        b_d = tl.load(delta_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_u = tl.load(u_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_B = tl.load(B_ptr, mask=m_n, other=0.0).to(tl.float32)
        b_C = tl.load(C_ptr, mask=m_n, other=0.0).to(tl.float32)
        b_h = tl.exp(b_d[:, None] * b_A) * b_h + (b_d * b_u)[:, None] * b_B[None, :]
        b_y = tl.sum(b_h * b_C[None, :], 1)
        if HAS_D:
            b_y += b_D * b_u
        tl.store(y_ptr, b_y.to(y_ptr.dtype.element_ty), mask=m_e)
        u_ptr += E
        delta_ptr += E
        y_ptr += E
        B_ptr += N
        C_ptr += N


@triton.jit
def selective_bwd_summary_kernel(
    delta_ptr, A_ptr, C_ptr, dy_ptr, dstates_ptr,  # (B*T, E), (E, N), (B*T, N), (B*T, E), (G, E, N) fp32
    begin_ptr, end_ptr, E, N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each chunk that comes from the chunk's own outputs."""
    i_c = tl.program_id(0).to(tl.int64)
    o_e, o_n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    m_e, m_n = o_e < E, o_n < N
    o_en, m_en = o_e[:, None] * N + o_n[None, :], m_e[:, None] & m_n[None, :]
    end = tl.load(end_ptr + i_c)
    b_A = tl.load(A_ptr + o_en, mask=m_en, other=0.0).to(tl.float32)
    delta_ptr += (end - 1) * E + o_e
    dy_ptr += (end - 1) * E + o_e
    C_ptr += (end - 1) * N + o_n
    b_G = tl.zeros([BLOCK_E, BLOCK_N], dtype=tl.float32)
    for _ in range((end - tl.load(begin_ptr + i_c)).to(tl.int32)):
        b_d = tl.load(delta_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr, mask=m_e, other=0.0).to(tl.float32)
        b_C = tl.load(C_ptr, mask=m_n, other=0.0).to(tl.float32)
        b_G = tl.exp(b_d[:, None] * b_A) * (b_G + b_dy[:, None] * b_C[None, :])
        delta_ptr -= E
        dy_ptr -= E
        C_ptr -= N
    tl.store(dstates_ptr + i_c * E * N + o_en, b_G, mask=m_en)


@triton.jit
def selective_bwd_states_kernel(
    A_ptr, total_ptr, dlast_ptr, dstates_ptr, dstate_ptr,  # (E, N), (G, E), (N, E, N), (G, E, N), (N, E, N); fp32 but A
    offsets_ptr, E, N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """In place: what each chunk adds to the gradient becomes the gradient of the state after it."""
    i_n = tl.program_id(0).to(tl.int64)
    o_e, o_n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    m_e = o_e < E
    o_en, m_en = o_e[:, None] * N + o_n[None, :], m_e[:, None] & (o_n < N)[None, :]
    stop = tl.load(offsets_ptr + i_n + 1)
    b_A = tl.load(A_ptr + o_en, mask=m_en, other=0.0).to(tl.float32)
    total_ptr += (stop - 1) * E + o_e
    dstates_ptr += (stop - 1) * E * N + o_en
    b_G = tl.load(dlast_ptr + i_n * E * N + o_en, mask=m_en, other=0.0)
    for _ in range((stop - tl.load(offsets_ptr + i_n)).to(tl.int32)):
        b_own = tl.load(dstates_ptr, mask=m_en, other=0.0)
        b_total = tl.load(total_ptr, mask=m_e, other=0.0)
        tl.store(dstates_ptr, b_G, mask=m_en)
        b_G = tl.exp(b_total[:, None] * b_A) * b_G + b_own
        total_ptr -= E
        dstates_ptr -= E * N
    tl.store(dstate_ptr + i_n * E * N + o_en, b_G, mask=m_en)


@triton.jit
def selective_bwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dy_ptr,  # the forward's, and (B*T, E)
    states_ptr, dstates_ptr,  # (G, E, N) fp32: the states before the chunks, the gradients of those after them
    du_ptr, ddelta_ptr,  # (B*T, E)
    dA_ptr, dB_ptr, dC_ptr,  # fp32: (G, E, N) sums over a chunk; (blocks of E, B*T, N) sums over a block, twice
    begin_ptr, end_ptr, tokens,
    E, N: tl.constexpr, HAS_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All gradients in one chunk and one block of channels, from the states around the chunk."""
    i_c, i_e = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_t, m_e = tl.arange(0, CHUNK), o_e < E
    begin = tl.load(begin_ptr + i_c)
    size = (tl.load(end_ptr + i_c) - begin).to(tl.int32)
    m_t, m_before, m_after = o_t < size, (o_t > 0) & (o_t <= size), o_t + 1 < size
    o_te, m_te = o_t[:, None] * E + o_e[None, :], m_t[:, None] & m_e[None, :]
    u_ptr += begin * E
    delta_ptr += begin * E
    B_ptr += begin * N
    C_ptr += begin * N
    # a missing step has delta 0: it is the identity on states and gradients
    b_u = tl.load(u_ptr + o_te, mask=m_te, other=0.0).to(tl.float32)
    b_d = tl.load(delta_ptr + o_te, mask=m_te, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + begin * E + o_te, mask=m_te, other=0.0).to(tl.float32)
    m_1 = m_before[:, None] & m_e[None, :]
    b_d1 = tl.load(delta_ptr - E + o_te, mask=m_1, other=0.0).to(tl.float32)  # of the step before
    b_x1 = b_d1 * tl.load(u_ptr - E + o_te, mask=m_1, other=0.0).to(tl.float32)
    b_d2 = tl.load(delta_ptr + E + o_te, mask=m_after[:, None] & m_e[None, :], other=0.0).to(tl.float32)  # of the next
    b_x = b_d * b_u
    b_dx = tl.zeros([CHUNK, BLOCK_E], dtype=tl.float32)
    b_dd = tl.zeros([CHUNK, BLOCK_E], dtype=tl.float32)
    o_part = (i_e * tokens + begin) * N
    for n in range(N):
        b_A = tl.load(A_ptr + o_e * N + n, mask=m_e, other=0.0).to(tl.float32)[None, :]
        b_B = tl.load(B_ptr + o_t * N + n, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_B1 = tl.load(B_ptr - N + o_t * N + n, mask=m_before, other=0.0).to(tl.float32)[:, None]
        b_C = tl.load(C_ptr + o_t * N + n, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_h0 = tl.load(states_ptr + (i_c * E + o_e) * N + n, mask=m_e, other=0.0)
        b_G0 = tl.load(dstates_ptr + (i_c * E + o_e) * N + n, mask=m_e, other=0.0)
        b_p, b_h = tl.associative_scan((tl.exp(b_d1 * b_A), b_x1 * b_B1), 0, _then)
        b_before = tl.exp(b_d * b_A) * (b_h + b_p * b_h0[None, :])  # a_t h_{t-1}
        b_h = b_before + b_x * b_B
        tl.store(dC_ptr + o_part + o_t * N + n, tl.sum(b_dy * b_h, 1), mask=m_t)
        b_p, b_G = tl.associative_scan((tl.exp(b_d2 * b_A), b_dy * b_C), 0, _then, reverse=True)
        b_G += b_p * b_G0[None, :]
        tl.store(dB_ptr + o_part + o_t * N + n, tl.sum(b_G * b_x, 1), mask=m_t)
        b_dx += b_G * b_B
        b_w = b_G * b_before
        b_dd += b_w * b_A
        tl.store(dA_ptr + (i_c * E + o_e) * N + n, tl.sum(b_w * b_d, 0), mask=m_e)
    b_du = b_dx * b_d
    if HAS_D:
        b_du += b_dy * tl.load(D_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_dd += b_dx * b_u
    tl.store(du_ptr + begin * E + o_te, b_du.to(du_ptr.dtype.element_ty), mask=m_te)
    tl.store(ddelta_ptr + begin * E + o_te, b_dd.to(ddelta_ptr.dtype.element_ty), mask=m_te)


def _constants(E: int, N: int) -> tuple[int, dict[str, int]]:
    """The number of channel blocks, and the constants of the kernels that walk."""
    block = min(32, triton.next_power_of_2(triton.cdiv(E, 2)))  # two blocks at least: small widths prove the sums too
    return triton.cdiv(E, block), {"N": N, "BLOCK_E": block, "BLOCK_N": triton.next_power_of_2(N)}


@torch.library.custom_op("zoo::selective_fwd", mutates_args=())
@dispatch.on_its_device
def selective_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor,
    begin: Tensor, end: Tensor, document: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u delta (B, T, E), A (E, N), B C (B, T, N), D (E,), state (N, E, N) float32, a ChunkTable of CHUNK.

    Returns y (B, T, E), the last states, and for the backward the states before chunks and the chunks' sums of delta.
    """
    u, delta, A, B, C, state = (x.contiguous() for x in (u, delta, A, B, C, state))
    n, (E, N) = begin.shape[0], A.shape
    y, last, states = torch.empty_like(u), torch.empty_like(state), state.new_empty(n, E, N)
    total, (blocks, constants) = state.new_empty(n, E), _constants(E, N)
    walk = {"num_warps": WALK_WARPS, **constants}
    selective_fwd_summary_kernel[n, blocks](u, delta, A, B, states, total, begin, end, E, **walk)
    selective_fwd_states_kernel[state.shape[0], blocks](A, total, state, states, last, offsets, E, **walk)
    selective_fwd_kernel[n, blocks](
        u, delta, A, B, C, A if D is None else D.contiguous(), states, y, begin, end, E, HAS_D=D is not None, **walk
    )
    return y, last, states, total


@selective_fwd.register_fake
def _(u, delta, A, B, C, D, state, begin, end, document, offsets):
    n, (E, N) = begin.shape[0], A.shape
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    return u.new_empty(u.shape), last, state.new_empty(n, E, N), state.new_empty(n, E)


@torch.library.custom_op("zoo::selective_bwd", mutates_args=())
@dispatch.on_its_device
def selective_bwd(
    dy: Tensor, dlast: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor, total: Tensor,
    begin: Tensor, end: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D (zeros (E,) without one) and state."""
    dy, dlast, u, delta, A, B, C = (x.contiguous() for x in (dy, dlast, u, delta, A, B, C))
    n, (E, N), tokens = begin.shape[0], A.shape, u.shape[0] * u.shape[1]
    dstates, dstate = torch.empty_like(states), torch.empty_like(dlast)
    blocks, constants = _constants(E, N)
    walk = {"num_warps": WALK_WARPS, **constants}
    selective_bwd_summary_kernel[n, blocks](delta, A, C, dy, dstates, begin, end, E, **walk)
    selective_bwd_states_kernel[dlast.shape[0], blocks](A, total, dlast, dstates, dstate, offsets, E, **walk)
    du, ddelta, dA = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(states)
    dB, dC = (states.new_empty(blocks, *x.shape) for x in (B, C))
    selective_bwd_kernel[n, blocks](
        u, delta, A, B, C, A if D is None else D.contiguous(), dy, states, dstates, du, ddelta, dA, dB, dC,
        begin, end, tokens, E, N=N, HAS_D=D is not None, CHUNK=CHUNK, BLOCK_E=constants["BLOCK_E"],
        num_warps=SCAN_WARPS,
    )  # fmt: skip
    if D is None:
        dD = torch.zeros(E, dtype=A.dtype, device=A.device)
    else:
        dD = (dy.float() * u.float()).sum((0, 1)).to(D.dtype)
    return du, ddelta, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD, dstate


@selective_bwd.register_fake
def _(dy, dlast, u, delta, A, B, C, D, states, total, begin, end, offsets):
    dD = A.new_empty(A.shape[0]) if D is None else D.new_empty(D.shape)
    return *(x.new_empty(x.shape) for x in (u, delta, A, B, C)), dD, dlast.new_empty(dlast.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, _, begin, end, _, offsets = inputs
    _, _, states, total = output
    ctx.mark_non_differentiable(states, total)
    ctx.save_for_backward(*tensors, states, total, begin, end, offsets)


@first_order("selective_scan")
def _backward(ctx, dy, dlast, dstates, dtotal):
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    *grads, dD, dstate = selective_bwd(dy, dlast, *saved)
    return *grads, None if saved[5] is None else dD, dstate, None, None, None, None


selective_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.selective_fwd)
def _flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """delta A, its exponential, the input and the multiply-add twice; the read-out."""
    B, T, E = u_shape
    return 12 * B * T * E * A_shape[1]


@register_flop_formula(torch.ops.zoo.selective_bwd)
def _flops_bwd(dy_shape, dlast_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, E = u_shape
    return 32 * B * T * E * A_shape[1]


def compile_cases() -> list[KernelCase]:
    """The published models: N = 16; E is a run-time argument. delta, A and D in float32, as the layer makes them."""
    cases = []
    for dtype, N in (("bf16", 16), ("fp32", 16), ("fp32", 4)):
        types = {f"{x}_ptr": f"*{dtype}" for x in ("u", "B", "C", "y", "dy", "du")} | {"E": "i32", "tokens": "i32"}
        types |= {f"{x}_ptr": "*i64" for x in ("begin", "end", "offsets")}
        for kernel in (
            selective_fwd_summary_kernel,
            selective_fwd_states_kernel,
            selective_fwd_kernel,
            selective_bwd_summary_kernel,
            selective_bwd_states_kernel,
            selective_bwd_kernel,
        ):
            constants = _constants(1536, N)[1] | {"HAS_D": True, "CHUNK": CHUNK}
            constants = {x: y for x, y in constants.items() if x in kernel.arg_names}
            signature = {x: types.get(x, "*fp32") for x in kernel.arg_names if x not in constants}
            warps = SCAN_WARPS if kernel is selective_bwd_kernel else WALK_WARPS
            cases.append(KernelCase(kernel, signature, constants, num_warps=warps, label=f"{dtype} N={N}"))
    return cases
