"""The torch form: one loop over time, one matrix product and a few calls a step, as one node of the graph.

Gates and states of all steps are kept in float32 (float64 for float64 inputs) for the backward. The gradients of R, b
and x are made of those of the gates after the loop, in one product and one sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.core.differentiation import drops_tangents, first_order
from zoo.ops.recurrent.rnn_sequential.cells import CELLS
from zoo.ops.recurrent.rnn_sequential.layout import Slabs


def _slabs(x: Tensor, cuts: Sequence[int] | None) -> Slabs:
    B, T, _, H, _ = x.shape
    return Slabs(B, T, H, None if cuts is None else tuple(cuts), x.device)


@torch.library.custom_op("zoo::rnn_loop", mutates_args=())
@drops_tangents
def rnn_loop(
    x: Tensor, R: Tensor, b: Tensor, state: Tensor, cell: str, cuts: Sequence[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (B, T, H, D), the last states, and, if `keep`, gates and states of all steps for the backward."""
    what, dtype = CELLS[cell], state.dtype
    slabs = _slabs(x, cuts)
    D, split = x.shape[-1], what.recurrent - (what.gates - what.given)  # x's gates before `split` have R
    wide = x.to(dtype) + b[what.gates - what.given :].to(dtype)
    gates = wide.new_empty(x.shape[0] * x.shape[1] * x.shape[3], what.recurrent, D)
    kept = wide.new_empty(what.kept, len(gates), D)
    rows = slabs.lay(wide.transpose(2, 3))  # (rows, given, D)
    if what.gates > what.given:
        steps = slabs.steps(gates[:, 0])
        for step in steps:
            step.copy_(b[0].to(dtype).unsqueeze(1))
    gates[:, what.recurrent - split :] = rows[:, :split]
    if split < what.given:
        kept[-1] = rows[:, split]
    before = slabs.enter(state)
    W = R.to(dtype).permute(1, 3, 0, 2).flatten(2)  # (H, D, recurrent * D)
    what.forward(gates, kept, before, W, slabs)
    last = slabs.leave(torch.stack([slabs.last(kept[s]) for s in range(what.states)]), state)
    h = torch.empty(x.shape[0], x.shape[1], *x.shape[3:], dtype=x.dtype, device=x.device)
    h.copy_(slabs.tokens(kept[0]))
    if not keep:
        return h, last, gates.new_empty(0), kept.new_empty(0)
    return h, last, gates, kept


@rnn_loop.register_fake
def _(
    x: Tensor, R: Tensor, b: Tensor, state: Tensor, cell: str, cuts: Sequence[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    what, rows = CELLS[cell], x.shape[0] * x.shape[1] * x.shape[3]
    D = x.shape[-1]
    gates = state.new_empty((rows, what.recurrent, D) if keep else (0,))
    kept = state.new_empty((what.kept, rows, D) if keep else (0,))
    return x.new_empty(x.shape[0], x.shape[1], x.shape[3], D), state.new_empty(state.shape), gates, kept


@torch.library.custom_op("zoo::rnn_loop_bwd", mutates_args=())
def rnn_loop_bwd(
    dh: Tensor, dlast: Tensor, R: Tensor, state: Tensor, gates: Tensor, kept: Tensor, cell: str,
    cuts: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, R, b and state; those of x and b in the dtype of h."""
    what, dtype = CELLS[cell], state.dtype
    B, T, H, _ = dh.shape
    slabs = Slabs(B, T, H, None if cuts is None else tuple(cuts), dh.device)
    before, carry = slabs.enter(state), slabs.enter(dlast)
    rows = slabs.lay(dh.to(dtype))
    slabs.add_to_last(rows, carry[0])
    W = R.to(dtype).permute(1, 0, 2, 3).flatten(1, 2)  # (H, recurrent * D, D)
    dg, dbefore = what.backward(gates, kept, before, rows, carry, W, slabs)
    dstate = slabs.leave(dbefore, dlast)
    dx = slabs.tokens(dg[:, what.gates - what.given :]).transpose(2, 3).to(dh.dtype, copy=True).contiguous()
    sent = slabs.heads(dg[:, : what.recurrent].flatten(1))  # (H, N, recurrent * D)
    dR = torch.bmm(sent.transpose(1, 2), slabs.heads(slabs.before(kept[0], before[0])))
    dR = dR.unflatten(1, (what.recurrent, -1)).transpose(0, 1)
    db = slabs.tokens(dg).sum((0, 1)).transpose(0, 1)  # (gates, H, D)
    return dx, dR.to(R.dtype).contiguous(), db.to(R.dtype).contiguous(), dstate


@rnn_loop_bwd.register_fake
def _(
    dh: Tensor, dlast: Tensor, R: Tensor, state: Tensor, gates: Tensor, kept: Tensor, cell: str,
    cuts: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    what, (B, T, H, D) = CELLS[cell], dh.shape
    dx, db = dh.new_empty(B, T, what.given, H, D), R.new_empty(what.gates, H, D)
    return dx, R.new_empty(R.shape), db, state.new_empty(state.shape)


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, str, Sequence[int] | None, bool],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    _, R, _, state, ctx.cell, ctx.cuts, keep = inputs
    assert keep, "a graph needs what the backward reads"
    _, _, gates, kept = output
    ctx.mark_non_differentiable(gates, kept)
    ctx.save_for_backward(R, state, gates, kept)


@first_order("a recurrent cell")
def _backward(
    ctx: Any, dh: Tensor, dlast: Tensor, dgates: Tensor | None, dkept: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *rnn_loop_bwd(dh, dlast, *ctx.saved_tensors, ctx.cell, ctx.cuts), None, None, None


rnn_loop.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.rnn_loop)
def _flops(x_shape: Sequence[int], R_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The products with R."""
    return 2 * x_shape[0] * x_shape[1] * R_shape[0] * R_shape[1] * R_shape[2] ** 2


@register_flop_formula(torch.ops.zoo.rnn_loop_bwd)
def _flops_bwd(
    dh_shape: Sequence[int],
    dlast_shape: Sequence[int],
    R_shape: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Twice: what goes back through R, and the gradient of R."""
    return 2 * _flops(dh_shape, R_shape)
