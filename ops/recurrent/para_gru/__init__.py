"""ParaGRU: a GRU whose recurrent matrices are diagonal, trained in parallel over time."""

from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.call import Operator
from zoo.ops.core.packing import each_document
from zoo.ops.recurrent.para_gru.cell import ParaGRUCell
from zoo.ops.recurrent.para_gru.reference import para_gru_reference
from zoo.ops.scans.newton_scan import clipped, precise, prepared, residual, solve

__all__ = ["para_gru"]

if dispatch.HAS_TRITON:
    from zoo.ops.recurrent.para_gru import kernels

CELL = ParaGRUCell()


OPERATOR = Operator("para_gru", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"u": 3, "a": 1}, shared=("resets",))
def para_gru(
    u: Tensor,
    a: Tensor,
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
    """Run a GRU with diagonal recurrence: z = sigmoid(a_z h' + u_z), r = sigmoid(a_r h' + u_r),
    c = tanh(a_c r h' + u_c), h = (1 - z) h' + z c, where h' is the state before.

    Args:
        u: what the input says to the gates z, r, c, bias included, (B, T, 3, D), any float dtype.
        a: recurrent weights of z, r, c, (3, D), of u's dtype or float32.
        state: h before the first step, (B, D); zeros when omitted. With packed documents (n, D).
        recurrent_clip: a is clamped to [-clip, clip]; at 0.5 Newton's method needs 3 or 4 steps on any input, but the
            cell forgets too much to count (parity is lost). None: as it is.
        iterations, window: of Newton's method, see `newton_scan`; leave them out for states that are those of the loop.
        return_residual: return how far the states are from obeying the recurrence, too (see `newton_residual`).
        resets: (B, T) bool, or None: where true, a new episode begins and the state before the step is dropped.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single step), "triton", "torch" or
            "reference". The kernels solve 64 steps at once and walk where Newton fails; `iterations` and `window` are
            the torch form's.

    Returns:
        h: all states, (B, T, D), in the dtype of u.
        last: the state after the last step, (B, D) or (n, D), float32 (float64 for float64 inputs); feed it back as
            `state` to continue.
        residual, where asked for: a number without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: see `newton_scan`; the backward keeps u and h. Context parallel: one summary a Newton step.
    Source: arXiv 2510.21450, equations 3.1a and 3.3. torch.nn.GRU has z and 1 - z exchanged.
    """
    name = "para_gru"
    check.shapes(name, {"u": (u, "B T G D"), "a": (a, "G D"), "state": (state, "n D")}, G=3)
    precise(name, u, a=a)
    (a,) = clipped(name, recurrent_clip, a)
    w = a.unbind(0)
    call, (state, keep, cuts) = prepared(
        OPERATOR, CELL, u, w, state, resets, cu_seqlens, iterations, window, own_kernels=True, backend=backend
    )  # fmt: skip
    if call.backend == "reference":
        shard.refuse(f"{name}'s loop")
        ones = state.new_ones(u.shape[:2]) if keep is None else keep.squeeze(-1)
        h, last = each_document(lambda u, k, h: para_gru_reference(u, k, h, a), cuts, (u, ones), state)
    elif call.backend == "triton" and not call.one_token:
        h, last = kernels.run(u, a, state, keep, cuts)
    else:
        h, last = solve(CELL, u, w, state, keep, cuts, iterations=iterations, window=window)
    return (h, last, residual(CELL, u, w, h, state, keep, cuts)) if return_residual else (h, last)
