"""Triton kernels of the recurrent cells, forward and backward: one program a head and a block of sequences.

The recurrent matrices are loaded once and stay on chip for the whole sequence, states stay in registers in float32, and
a step is one product a gate. The backward makes the gates of all steps again by one product before its loop, where no
step waits for another, and the gradients of R, b and x by one product and one sum after it: the loop itself holds R
and the carried gradients, nothing else. Documents of one block end at different steps; ended ones keep their states.
Sums are in a fixed order, without atomics: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core import dispatch
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.kernel_case import KernelCase
from zoo.ops.recurrent.rnn_sequential.cells import CELLS

MAX_HELD = 128 * 1024  # bytes of R that a program holds, in shared memory; more is read in every step, from the cache
BLOCK_B = 16  # sequences a program, the least that tensor cores multiply. Not tuned on a device yet.


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, y, -y)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _dot(b_x, b_R, PRECISION: tl.constexpr):
    return tl.dot(b_x.to(b_R.dtype), b_R, input_precision=PRECISION)


@triton.jit
def _matrix(R_ptr, g, i_h, H, o_left, o_right, D: tl.constexpr, WIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """R of gate g, [D_out, D_in] or transposed; WIDE: in float32."""
    m = (o_left < D)[:, None] & (o_right < D)[None, :]
    o = o_right[None, :] * D + o_left[:, None] if TRANSPOSED else o_left[:, None] * D + o_right[None, :]
    b_R = tl.load(R_ptr + (g * H + i_h) * D * D + o, mask=m, other=0.0)
    if WIDE:
        b_R = b_R.to(tl.float32)
    return b_R


@triton.jit
def _load(ptr, o, m):
    return tl.load(ptr + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def rnn_fwd_kernel(
    x_ptr, R_ptr, b_ptr, state_ptr,  # (tokens, given, H, D), (recurrent, H, D, D), (gates, H, D), (n, S, H, D) fp32
    h_ptr, last_ptr, kept_ptr,  # (tokens, H, D), (n, S, H, D) fp32, (S - 1, tokens, H, D) fp32: all states but h
    row_ptr, begin_ptr, length_ptr, rows, tokens, H,
    CELL: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All states of one head and one block of sequences, step by step, with R on chip."""
    i_h, o_b = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_d = tl.arange(0, BLOCK_D)
    m_b, m_d = o_b < rows, o_d < D
    row = tl.load(row_ptr + o_b, mask=m_b, other=0)
    begin = tl.load(begin_ptr + o_b, mask=m_b, other=0)
    length = tl.load(length_ptr + o_b, mask=m_b, other=0)
    m_bd = m_b[:, None] & m_d[None, :]
    S: tl.constexpr = 4 if CELL == "slstm" else (2 if CELL == "lstm" else 1)
    GIVEN: tl.constexpr = 1 if CELL == "elman" else (3 if CELL == "gru" else 4)
    o_state = (row[:, None] * S * H + i_h) * D + o_d[None, :]
    b_h = _load(state_ptr, o_state, m_bd)
    o_bias = i_h * D + o_d
    b_0 = _load(b_ptr, o_bias, m_d)
    if not STREAM:
        b_R0 = _matrix(R_ptr, 0, i_h, H, o_d, o_d, D, WIDE, True)
    if CELL != "elman":
        b_1 = _load(b_ptr, o_bias + H * D, m_d)
        b_2 = _load(b_ptr, o_bias + 2 * H * D, m_d)
        b_3 = _load(b_ptr, o_bias + 3 * H * D, m_d)
        if not STREAM:
            b_R1 = _matrix(R_ptr, 1, i_h, H, o_d, o_d, D, WIDE, True)
            b_R2 = _matrix(R_ptr, 2, i_h, H, o_d, o_d, D, WIDE, True)
    if S > 1:
        b_c = _load(state_ptr, o_state + H * D, m_bd)
        if not STREAM:
            b_R3 = _matrix(R_ptr, 3, i_h, H, o_d, o_d, D, WIDE, True)
    if S > 2:
        b_n = _load(state_ptr, o_state + 2 * H * D, m_bd)
        b_m = _load(state_ptr, o_state + 3 * H * D, m_bd)
    for t in range(tl.max(length).to(tl.int32)):
        m_t = (t < length)[:, None] & m_d[None, :]
        o_t = (begin + t)[:, None] * H * D + i_h * D + o_d[None, :]
        o_x = (begin + t)[:, None] * GIVEN * H * D + i_h * D + o_d[None, :]
        b_x = _load(x_ptr, o_x, m_t)
        if STREAM:
            b_R0 = _matrix(R_ptr, 0, i_h, H, o_d, o_d, D, WIDE, True)
        b_g = _dot(b_h, b_R0, PRECISION) + b_0[None, :]
        if CELL == "elman":
            b_h = tl.where(m_t, _tanh(b_x + b_g), b_h)
        else:
            b_x1 = _load(x_ptr, o_x + H * D, m_t)
            b_x2 = _load(x_ptr, o_x + 2 * H * D, m_t)
            if STREAM:
                b_R1 = _matrix(R_ptr, 1, i_h, H, o_d, o_d, D, WIDE, True)
            b_g1 = _dot(b_h, b_R1, PRECISION) + b_1[None, :]
            if STREAM:
                b_R2 = _matrix(R_ptr, 2, i_h, H, o_d, o_d, D, WIDE, True)
            b_g2 = _dot(b_h, b_R2, PRECISION) + b_2[None, :]
            if CELL == "gru":  # g, r, z, n; x has r, z, n
                b_z = _sigmoid(b_x1 + b_g2)
                b_new = _tanh(b_x2 + b_3[None, :] + _sigmoid(b_x + b_g1) * b_g)
                b_h = tl.where(m_t, b_z * b_h + (1.0 - b_z) * b_new, b_h)
            else:  # i, f, z, o
                b_x3 = _load(x_ptr, o_x + 3 * H * D, m_t)
                if STREAM:
                    b_R3 = _matrix(R_ptr, 3, i_h, H, o_d, o_d, D, WIDE, True)
                b_o = _sigmoid(b_x3 + _dot(b_h, b_R3, PRECISION) + b_3[None, :])
                b_z = _tanh(b_x2 + b_g2)
                if CELL == "lstm":
                    b_c = tl.where(m_t, _sigmoid(b_x1 + b_g1) * b_c + _sigmoid(b_x + b_g) * b_z, b_c)
                    b_h = tl.where(m_t, b_o * _tanh(b_c), b_h)
                else:
                    b_i = b_x + b_g
                    b_l = _log_sigmoid(b_x1 + b_g1) + b_m
                    b_m1 = tl.where((b_n == 0) | (b_i > b_l), b_i, b_l)
                    b_i = tl.exp(b_i - b_m1)
                    b_f = tl.exp(tl.minimum(b_l - b_m1, 0.0))
                    b_c = tl.where(m_t, b_f * b_c + b_i * b_z, b_c)
                    b_n = tl.where(m_t, b_f * b_n + b_i, b_n)
                    b_m = tl.where(m_t, b_m1, b_m)
                    b_h = tl.where(m_t, b_o * b_c / tl.where(m_t, b_n, 1.0), b_h)
        tl.store(h_ptr + o_t, b_h.to(h_ptr.dtype.element_ty), mask=m_t)
        if KEEP:
            o_k = tokens.to(tl.int64) * H * D
            if S > 1:
                tl.store(kept_ptr + o_t, b_c, mask=m_t)
            if S > 2:
                tl.store(kept_ptr + o_k + o_t, b_n, mask=m_t)
                tl.store(kept_ptr + 2 * o_k + o_t, b_m, mask=m_t)
    tl.store(last_ptr + o_state, b_h, mask=m_bd)
    if S > 1:
        tl.store(last_ptr + o_state + H * D, b_c, mask=m_bd)
    if S > 2:
        tl.store(last_ptr + o_state + 2 * H * D, b_n, mask=m_bd)
        tl.store(last_ptr + o_state + 3 * H * D, b_m, mask=m_bd)


@triton.jit
def _before(state_ptr, o_state, kept_ptr, o_before, m_first, m_later):
    """A state before a step: the initial one, or that of the step before."""
    return _load(state_ptr, o_state, m_first) + _load(kept_ptr, o_before, m_later)


@triton.jit
def rnn_bwd_kernel(
    gates_ptr, dgates_ptr,  # (H, tokens, gates, D) fp32: pre-activations (of GRU's n: without g), and their gradients
    R_ptr, state_ptr, kept_ptr, before_ptr,  # the forward's, and h before each step, (H, tokens, D) fp32
    dh_ptr, dlast_ptr, dstate_ptr,  # (tokens, H, D), (n, S, H, D) fp32 twice; m's are the gradient that m is set to
    row_ptr, begin_ptr, length_ptr, rows, tokens, H,
    CELL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates and of the first state, of one head and one block of sequences, against time."""
    i_h, o_b = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_d = tl.arange(0, BLOCK_D)
    m_b, m_d = o_b < rows, o_d < D
    row = tl.load(row_ptr + o_b, mask=m_b, other=0)
    begin = tl.load(begin_ptr + o_b, mask=m_b, other=0)
    length = tl.load(length_ptr + o_b, mask=m_b, other=0)
    m_bd = m_b[:, None] & m_d[None, :]
    S: tl.constexpr = 4 if CELL == "slstm" else (2 if CELL == "lstm" else 1)
    GATES: tl.constexpr = 1 if CELL == "elman" else 4
    o_state = (row[:, None] * S * H + i_h) * D + o_d[None, :]
    b_dh = _load(dlast_ptr, o_state, m_bd)
    if not STREAM:
        b_R0 = _matrix(R_ptr, 0, i_h, H, o_d, o_d, D, WIDE, False)
        if CELL != "elman":
            b_R1 = _matrix(R_ptr, 1, i_h, H, o_d, o_d, D, WIDE, False)
            b_R2 = _matrix(R_ptr, 2, i_h, H, o_d, o_d, D, WIDE, False)
        if S > 1:
            b_R3 = _matrix(R_ptr, 3, i_h, H, o_d, o_d, D, WIDE, False)
    if S > 1:
        b_dc = _load(dlast_ptr, o_state + H * D, m_bd)
    if S > 2:
        b_dn = _load(dlast_ptr, o_state + 2 * H * D, m_bd)
        b_E = _load(dlast_ptr, o_state + 3 * H * D, m_bd)
    steps = tl.max(length).to(tl.int32)
    for back in range(steps):
        t = steps - 1 - back
        m_t = (t < length)[:, None] & m_d[None, :]
        token = (begin + t)[:, None]
        o_t = token * H * D + i_h * D + o_d[None, :]
        o_g = (i_h * tokens + token) * GATES * D + o_d[None, :]
        b_d = b_dh + _load(dh_ptr, o_t, m_t)
        b_0 = _load(gates_ptr, o_g, m_t)
        if CELL == "elman":
            b_y = _tanh(b_0)
            b_d0 = tl.where(m_t, b_d * (1.0 - b_y * b_y), 0.0)
            if STREAM:
                b_R0 = _matrix(R_ptr, 0, i_h, H, o_d, o_d, D, WIDE, False)
            b_dh = tl.where(m_t, _dot(b_d0, b_R0, PRECISION), b_dh)
            tl.store(dgates_ptr + o_g, b_d0, mask=m_t)
        else:
            b_1 = _load(gates_ptr, o_g + D, m_t)
            b_2 = _load(gates_ptr, o_g + 2 * D, m_t)
            b_3 = _load(gates_ptr, o_g + 3 * D, m_t)
            if CELL == "gru":
                b_h = _load(before_ptr, (i_h * tokens + token) * D + o_d[None, :], m_t)
                b_r, b_z = _sigmoid(b_1), _sigmoid(b_2)
                b_n = _tanh(b_3 + b_r * b_0)
                b_d3 = tl.where(m_t, b_d * (1.0 - b_z) * (1.0 - b_n * b_n), 0.0)
                b_d0 = b_d3 * b_r
                b_d1 = b_d0 * b_0 * (1.0 - b_r)
                b_d2 = tl.where(m_t, b_d * (b_h - b_n) * b_z * (1.0 - b_z), 0.0)
                b_next = b_d * b_z
            else:
                at_first = (begin + t == begin)[:, None]  # a tensor: t is a plain int in the interpreter
                m_later, m_first = m_t & ~at_first, m_t & at_first
                o_before = o_t - H * D
                b_z, b_o = _tanh(b_2), _sigmoid(b_3)
                b_c = _before(state_ptr, o_state + H * D, kept_ptr, o_before, m_first, m_later)
                if CELL == "lstm":
                    b_i, b_f = _sigmoid(b_0), _sigmoid(b_1)
                    b_y = _tanh(b_f * b_c + b_i * b_z)
                    b_D = tl.where(m_t, b_dc + b_d * b_o * (1.0 - b_y * b_y), 0.0)
                    b_d0 = b_D * b_z * b_i * (1.0 - b_i)
                    b_d1 = b_D * b_c * b_f * (1.0 - b_f)
                    b_d3 = tl.where(m_t, b_d * b_y * b_o * (1.0 - b_o), 0.0)
                else:
                    o_k = tokens.to(tl.int64) * H * D
                    b_n = _before(state_ptr, o_state + 2 * H * D, kept_ptr, o_before + o_k, m_first, m_later)
                    b_m = _before(state_ptr, o_state + 3 * H * D, kept_ptr, o_before + 2 * o_k, m_first, m_later)
                    b_l = _log_sigmoid(b_1) + b_m
                    won = (b_n != 0) & (b_0 <= b_l)  # m is b_l
                    b_top = tl.where(won, b_l, b_0)
                    b_i, b_f = tl.exp(b_0 - b_top), tl.exp(tl.minimum(b_l - b_top, 0.0))
                    b_n1 = b_f * b_n + b_i
                    b_y = (b_f * b_c + b_i * b_z) / b_n1
                    b_D = tl.where(m_t, b_dc + b_d * b_o / b_n1, 0.0)
                    b_N = tl.where(m_t, b_dn - b_d * b_o * b_y / b_n1, 0.0)
                    b_pass = tl.where(won & m_t, b_E, 0.0)
                    b_d0 = b_i * (b_D * b_z + b_N) + tl.where(m_t, b_E - b_pass, 0.0)
                    b_d1 = (b_f * (b_D * b_c + b_N * b_n) + b_pass) * _sigmoid(-b_1)
                    b_d3 = tl.where(m_t, b_d * b_y * b_o * (1.0 - b_o), 0.0)
                    b_dn = tl.where(m_t, b_N * b_f, b_dn)
                    b_E = tl.where(m_t, b_pass, b_E)
                b_d2 = b_D * b_i * (1.0 - b_z * b_z)
                b_dc = tl.where(m_t, b_D * b_f, b_dc)
                if STREAM:
                    b_R3 = _matrix(R_ptr, 3, i_h, H, o_d, o_d, D, WIDE, False)
                b_next = _dot(b_d3, b_R3, PRECISION)
            tl.store(dgates_ptr + o_g, b_d0, mask=m_t)
            tl.store(dgates_ptr + o_g + D, b_d1, mask=m_t)
            tl.store(dgates_ptr + o_g + 2 * D, b_d2, mask=m_t)
            tl.store(dgates_ptr + o_g + 3 * D, b_d3, mask=m_t)
            if STREAM:
                b_R0 = _matrix(R_ptr, 0, i_h, H, o_d, o_d, D, WIDE, False)
            b_next += _dot(b_d0, b_R0, PRECISION)
            if STREAM:
                b_R1 = _matrix(R_ptr, 1, i_h, H, o_d, o_d, D, WIDE, False)
            b_next += _dot(b_d1, b_R1, PRECISION)
            if STREAM:
                b_R2 = _matrix(R_ptr, 2, i_h, H, o_d, o_d, D, WIDE, False)
            b_next += _dot(b_d2, b_R2, PRECISION)
            b_dh = tl.where(m_t, b_next, b_dh)
    tl.store(dstate_ptr + o_state, b_dh, mask=m_bd)
    if S > 1:
        tl.store(dstate_ptr + o_state + H * D, b_dc, mask=m_bd)
    if S > 2:
        tl.store(dstate_ptr + o_state + 2 * H * D, b_dn, mask=m_bd)
        tl.store(dstate_ptr + o_state + 3 * H * D, b_E, mask=m_bd)


def _launch(cell: str, D: int, dtype: torch.dtype, backward: bool) -> dict[str, object]:
    """Constants and warps. Gradients in float16 would underflow: its backward is widened, and TF32 has no fewer digits.

    Warps were chosen by the compiler's report: the fewest that do not spill on sm_80 and sm_90.
    """
    wide = dtype == torch.float32 or (backward and dtype == torch.float16)
    narrow = "tf32" if dispatch.EXACT_PRODUCTS == "tf32x3" else dispatch.EXACT_PRODUCTS
    block = max(16, triton.next_power_of_2(D))
    held = CELLS[cell].recurrent * block * block * (4 if wide else 2)  # bytes of R
    return {
        "CELL": cell, "D": D, "WIDE": wide, "STREAM": held > MAX_HELD, "BLOCK_B": BLOCK_B, "BLOCK_D": block,
        "PRECISION": dispatch.EXACT_PRODUCTS if dtype == torch.float32 else narrow,
        "num_warps": min(8, block // (8 if wide or (backward and block > 32) else 16)), "num_stages": 1,
    }  # fmt: skip


@torch.library.custom_op("zoo::rnn_fwd", mutates_args=())
@dispatch.on_its_device
def rnn_fwd(
    x: Tensor, R: Tensor, b: Tensor, state: Tensor, row: Tensor, begin: Tensor, length: Tensor, cell: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, given, H, D), R, b, state (n, S, H, D) float32, Documents.

    Returns h, the last states, and, if `keep`, all states but h for the backward.
    """
    x, R, b, state = (z.contiguous() for z in (x, R, b, state))
    B, T, _, H, D = x.shape
    h, last = x.new_empty(B, T, H, D), state.clone()
    kept = state.new_empty(state.shape[1] - 1 if keep else 0, B * T, H, D)
    rnn_fwd_kernel[H, triton.cdiv(len(row), BLOCK_B)](
        x, R, b, state, h, last, kept, row, begin, length, len(row), B * T, H, KEEP=keep,
        **_launch(cell, D, x.dtype, backward=False),
    )  # fmt: skip
    return h, last, kept


@rnn_fwd.register_fake
def _(x, R, b, state, row, begin, length, cell, keep):
    B, T, _, H, D = x.shape
    kept = state.new_empty(state.shape[1] - 1 if keep else 0, B * T, H, D)
    return x.new_empty(B, T, H, D), state.new_empty(state.shape), kept


@torch.library.custom_op("zoo::rnn_bwd", mutates_args=())
@dispatch.on_its_device
def rnn_bwd(
    dh: Tensor, dlast: Tensor, x: Tensor, R: Tensor, b: Tensor, state: Tensor, row: Tensor, begin: Tensor,
    length: Tensor, h: Tensor, last: Tensor, kept: Tensor, cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, R, b and state."""
    dh, R, state = dh.contiguous(), R.contiguous(), state.contiguous()
    (B, T, _, H, D), what = x.shape, CELLS[cell]
    before = _before_each(h.view(B * T, H, D), state[:, 0], row, begin)
    gates = _gates(x.reshape(B * T, -1, H, D), R, b, before, what.gates)
    dgates, dstate, dlast = torch.empty_like(gates), dlast.clone(), dlast.contiguous()
    if cell == "slstm":  # what m is set to: c and n are the same memory over another exp(m)
        E = dlast[:, 3] - last[:, 1] * dlast[:, 1] - last[:, 2] * dlast[:, 2]
        dlast = torch.cat([dlast[:, :3], E.unsqueeze(1)], dim=1)
        dstate = dlast.clone()
    rnn_bwd_kernel[H, triton.cdiv(len(row), BLOCK_B)](
        gates, dgates, R, state, kept, before, dh, dlast, dstate, row, begin, length, len(row), B * T, H,
        **_launch(cell, D, x.dtype, backward=True),
    )  # fmt: skip
    if cell == "slstm":
        dstate[:, 3] += state[:, 1] * dstate[:, 1] + state[:, 2] * dstate[:, 2]
    recurrent, given = R.shape[0], x.shape[2]
    dx = dgates[:, :, what.gates - given :].permute(1, 2, 0, 3).to(x.dtype).reshape(x.shape)
    sent = dgates[:, :, :recurrent].flatten(2)  # (H, tokens, recurrent * D)
    dR = torch.bmm(sent.transpose(1, 2), before).unflatten(1, (recurrent, D)).transpose(0, 1)
    db = dgates.sum(1).transpose(0, 1)
    return dx.contiguous(), dR.to(R.dtype).contiguous(), db.to(b.dtype).contiguous(), dstate


def _before_each(h: Tensor, state: Tensor, row: Tensor, begin: Tensor) -> Tensor:
    """h before each step in float32, (H, tokens, D), of h (tokens, H, D) and the initial one (n, H, D)."""
    before = torch.cat([h[:1], h[:-1]]).to(state.dtype)
    before[begin] = state[row]
    return before.transpose(0, 1).contiguous()


def _gates(x: Tensor, R: Tensor, b: Tensor, before: Tensor, gates: int) -> Tensor:
    """Pre-activations of all steps, (H, tokens, gates, D) float32: x (tokens, given, H, D) + R h + b."""
    (tokens, given, H, D), recurrent = x.shape, R.shape[0]
    made = before.new_empty(H, tokens, gates, D)
    made[:, :, :recurrent] = torch.bmm(before, R.to(before.dtype).permute(1, 3, 0, 2).flatten(2)).unflatten(
        2, (recurrent, D)
    )
    made[:, :, recurrent:] = 0
    made += b.to(before.dtype).transpose(0, 1).unsqueeze(1)
    made[:, :, gates - given :] += x.permute(2, 0, 1, 3)
    return made


@rnn_bwd.register_fake
def _(dh, dlast, x, R, b, state, row, begin, length, h, last, kept, cell):
    return x.new_empty(x.shape), R.new_empty(R.shape), b.new_empty(b.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.cell, keep = inputs
    assert keep, "a graph needs what the backward reads"
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)


@first_order("a recurrent cell")
def _backward(ctx, dh, dlast, dkept):
    return *rnn_bwd(dh, dlast, *ctx.saved_tensors, ctx.cell), None, None, None, None, None


rnn_fwd.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.rnn_fwd)
def _flops(x_shape, R_shape, *args, out_shape=None, **kwargs) -> int:
    """The products with R."""
    return 2 * x_shape[0] * x_shape[1] * R_shape[0] * R_shape[1] * R_shape[2] ** 2


@register_flop_formula(torch.ops.zoo.rnn_bwd)
def _flops_bwd(dh_shape, dlast_shape, x_shape, R_shape, *args, out_shape=None, **kwargs) -> int:
    """Three times: the gates again, what goes back through R, and the gradient of R."""
    return 3 * _flops(x_shape, R_shape)


def compile_cases() -> list[KernelCase]:
    """Heads of every block size, in the types that models train in; H is a run-time argument."""
    names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
    cases = []
    for dtype, D, cell in (
        (torch.bfloat16, 64, "lstm"),
        (torch.bfloat16, 64, "slstm"),
        (torch.bfloat16, 64, "gru"),
        (torch.bfloat16, 128, "lstm"),
        (torch.bfloat16, 128, "slstm"),
        (torch.bfloat16, 32, "slstm"),
        (torch.bfloat16, 16, "elman"),
        (torch.float16, 64, "slstm"),
        (torch.float16, 128, "slstm"),
        (torch.float32, 32, "lstm"),
        (torch.float32, 64, "slstm"),
        (torch.float32, 128, "slstm"),
    ):
        types = {f"{x}_ptr": f"*{names[dtype]}" for x in ("x", "R", "b", "h", "dh")}
        types |= {f"{x}_ptr": "*i64" for x in ("row", "begin", "length")}
        types |= dict.fromkeys(("rows", "tokens", "H"), "i32")
        for kernel in (rnn_fwd_kernel, rnn_bwd_kernel):
            backward = kernel is rnn_bwd_kernel
            launch = _launch(cell, D, dtype, backward) | {"KEEP": True}
            constants = {x: y for x, y in launch.items() if x in kernel.arg_names}
            signature = {x: types.get(x, "*fp32") for x in kernel.arg_names if x not in constants}
            spills = 0
            if launch["STREAM"]:  # matrices that no multiprocessor holds: a spill is one more read from the cache
                spills = 832 if dtype == torch.float32 else 80
            elif backward and cell == "slstm" and (D == 128 or dtype == torch.float16):
                spills = 8  # three states, their gradients and four gates at once; twice the warps spill as much
            label = f"{cell} {names[dtype]} D={D}"
            cases.append(KernelCase(kernel, signature, constants, int(str(launch["num_warps"])), 1, spills, label))
    return cases
