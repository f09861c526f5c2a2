"""ParaLSTM: an LSTM whose recurrent matrices are diagonal, trained in parallel over time."""

from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.call import Operator
from zoo.ops.core.packing import each_document
from zoo.ops.recurrent.para_lstm.cell import ParaLSTMCell
from zoo.ops.recurrent.para_lstm.reference import para_lstm_reference
from zoo.ops.scans.newton_scan import clipped, precise, prepared, residual, solve

__all__ = ["para_lstm"]

if dispatch.HAS_TRITON:
    from zoo.ops.recurrent.para_lstm import kernels

CELL = ParaLSTMCell()


OPERATOR = Operator("para_lstm", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"u": 3, "a": 1, "p": 1}, shared=("resets",))
def para_lstm(
    u: Tensor,
    a: Tensor,
    p: Tensor,
    state: Tensor | None = None,
    *,
    recurrent_clip: float | None = None,
    iterations: int | None = None,
    window: int | None = None,
    return_residual: bool = False,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Run an LSTM with diagonal recurrence, one gate to forget and to write, and peepholes:
    f = sigmoid(a_f h' + p_f c' + u_f), c = f c' + (1 - f) tanh(a_z h' + u_z), o = sigmoid(a_o h' + p_o c + u_o),
    h = o tanh(c), where c' and h' are the states before.

    Args:
        u: what the input says to f, o, z, bias included, (B, T, 3, D), any float dtype.
        a: recurrent weights of f, o, z, (3, D), of u's dtype or float32.
        p: peepholes of f (on the old c) and o (on the new c), (2, D), as a.
        state: c and h before the first step, (B, D, 2); zeros when omitted. With packed documents (n, D, 2).
        recurrent_clip: a and p are clamped to [-clip, clip]; at 0.5 Newton's method needs 3 or 4 steps. None: as is.
        iterations, window: of Newton's method, see `newton_scan`; leave them out for states that are those of the loop.
        return_residual: return how far the states are from obeying the recurrence, too (see `newton_residual`).
        resets: (B, T) bool, or None: where true, a new episode begins and the state before the step is dropped.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: as for `para_gru`.

    Returns:
        h: (B, T, D), in the dtype of u.
        last: c and h after the last step, (B, D, 2) or (n, D, 2), float32 (float64 for float64 inputs); feed it back as
            `state` to continue.
        residual, where asked for: a number without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: see `newton_scan`; the backward keeps u, c and h. Context parallel: one summary a Newton step.
    Source: arXiv 2510.21450, equation 3.1b. Inside Newton the output gate sees the new c, as in the recurrence; the
        official code takes the iterate's, with the same solution.
    """
    name = "para_lstm"
    check.shapes(
        name, {"u": (u, "B T G D"), "a": (a, "G D"), "p": (p, "P D"), "state": (state, "n D S")}, G=3, P=2, S=2
    )
    precise(name, u, a=a, p=p)
    a, p = clipped(name, recurrent_clip, a, p)
    w = (*a.unbind(0), *p.unbind(0))
    call, (state, keep, cuts) = prepared(
        OPERATOR, CELL, u, w, state, resets, cu_seqlens, iterations, window, own_kernels=True, backend=backend
    )  # fmt: skip
    if call.backend == "reference":
        shard.refuse(f"{name}'s loop")
        ones = state.new_ones(u.shape[:2]) if keep is None else keep.squeeze(-1)
        states, last = each_document(lambda u, k, s: para_lstm_reference(u, k, s, a, p), cuts, (u, ones), state)
    elif call.backend == "triton" and not call.one_token:
        states, last = kernels.run(u, a, p, state, keep, cuts)
    else:
        states, last = solve(CELL, u, w, state, keep, cuts, iterations=iterations, window=window)
    h = states[..., 1]
    return (h, last, residual(CELL, u, w, states, state, keep, cuts)) if return_residual else (h, last)
