"""Quasiseparable mixing (Hydra): two state space scans, one from each end, and a diagonal of its own."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.call import Operator
from zoo.ops.state_spaces.quasiseparable.reference import quasiseparable_reference
from zoo.ops.state_spaces.ssd import ssd, ssd_summary

__all__ = ["quasiseparable"]

DIRECTIONS = 2


OPERATOR = Operator("quasiseparable", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"x": 2, "dt": 3, "A": 0, "D": 2}, grouped={"B": 3, "C": 3})
def quasiseparable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix time by y_i = sum_{j<i} C_{i-1} . S_{ij} x_j + D_i x_i + sum_{j>i} C_{i+1} . S_{ij} x_j, head by head.

    S_{ij} = dt_j B_j times the decays exp(dt_m A) of the steps strictly between j and i, with the dt, B, C of the
    direction: the state of `ssd` before token i, from the left and from the right, is read by the neighbour's C. A
    token's own dt, B and C never reach its own output; D alone does.

    Args:
        x: input, (B, T, H, P), any float dtype, shared by x, B and C.
        dt: step sizes of both directions, (B, T, 2, H), >= 0 (not checked); first the one from the left.
        A: rate of each head, (H,), <= 0 (not checked), for both directions.
        B, C: what writes to and reads from the memories, (B, T, 2, G, N); H / G neighbouring heads share a group.
        D: weight of each token on its own output, (B, T, H), or None for a zero diagonal.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; nothing crosses a border in either direction.
        backend: "auto", "triton" or "torch", of `ssd`, or "reference": the explicit matrix, T^2 numbers a head.

    Returns:
        y: (B, T, H, P), in the dtype of x. There is no state: the outputs need both ends.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend cannot run here, or the reference is asked for where
            time is cut across ranks.

    Cost: twice that of `ssd`. Across ranks each receives a state and one token's C from either side, both ways at once.
    Source: arXiv 2407.09941, section 3 (proposition 3.7); the indices are the official code's.
    """
    args = {
        "x": (x, "B T H P"), "dt": (dt, "B T 2 H"), "A": (A, "H"), "B": (B, "B T 2 G N"), "C": (C, "B T 2 G N"),
        "D": (D, "B T H"),
    }  # fmt: skip
    call = OPERATOR.begin(
        args, alike=("x", "B", "C"), known={"2": DIRECTIONS}, cu_seqlens=cu_seqlens, backend=backend
    )  # fmt: skip
    H, G = call.sizes["H"], call.sizes["G"]
    if G == 0 or H % G:
        raise ValueError(
            f"{call.name}: the number of heads must be a multiple of the groups of B and C; got H = {H}, G = {G}"
        )
    if backend == "reference":
        shard.refuse("The explicit matrix of quasiseparable mixing")
    if x.shape[1] == 0 and shard.current() is None:
        return torch.zeros_like(x)
    if backend == "reference":
        return _reference(x, dt, A, B, C, D, call.cuts)
    return _two_scans(x, dt, A, B, C, D, call.cuts, backend)


def _reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cuts: tuple[int, ...] | None
) -> Tensor:
    wide = dispatch.state_dtype(x)
    D = x.new_zeros(x.shape[:3]) if D is None else D
    A, timed, outputs = A.to(wide), [z.to(wide) for z in (x, dt, B, C, D)], []
    for left, right in itertools.pairwise(cuts or (0, x.shape[1])):
        if left < right:
            u, step, write, read, own = (z[:, left:right] for z in timed)
            outputs.append(quasiseparable_reference(u, step, A, write, read, own))
    return torch.cat(outputs, dim=1).to(x.dtype)


def _two_scans(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cuts: tuple[int, ...] | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """Both directions as one call of `ssd`: side by side in the batch, or one after the other as packed documents."""
    T = x.shape[1]
    side = 0 if cuts is None else 1
    both = None
    if cuts is not None:  # on the CPU: only the host reads boundaries, and it has just read these
        both = torch.tensor([*cuts, *(T + cut for cut in shard.mirrored(cuts)[1:])])
    x2, dt2, B2, C2 = (
        torch.cat([left, right.flip(1)], dim=side)
        for left, right in ((x, x), *((z[:, :, 0], z[:, :, 1]) for z in (dt, B, C)))
    )
    edges = _Edges() if shard.current() is None else _across(x, dt, A, B, C, cuts)
    with shard.unsharded():
        y = ssd(x2, dt2, A, B2, C2, state=edges.states, cu_seqlens=both, backend=backend)[0]
    forward, backward = y.chunk(2, dim=side)
    inside = ((), ()) if cuts is None else (cuts[1:-1], shard.mirrored(cuts)[1:-1])
    forward = _shifted(forward, edges.left, inside[0])
    backward = _shifted(backward, edges.right, inside[1])
    y = forward + backward.flip(1)
    return y if D is None else torch.addcmul(y, D.to(y.dtype).unsqueeze(-1), x)


def _shifted(y: Tensor, first: Tensor | None, starts: tuple[int, ...]) -> Tensor:
    """Token i gets what the state before it says: `first` in front, nothing where a further document starts."""
    T = y.shape[1]
    first = torch.zeros_like(y[:, :1]) if first is None else first
    y = torch.cat([first, y], dim=1)[:, :T]
    starts = tuple(start for start in starts if start < T)
    return y.index_fill(1, torch.tensor(starts, device=y.device), 0.0) if starts else y


class _Edges(NamedTuple):
    """What enters a stretch of time on both sides; nothing where time is not cut.

    states: before the first token of every row or document, first of those from the left, (2 n, H, N, P).
    left, right: what the entering states say to the first and to the last token, (B, 1, H, P).
    """

    states: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def _across(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cuts: tuple[int, ...] | None) -> _Edges:
    """States from both sides, and the neighbours' C, with which the tokens at the edges read them."""
    batch, H, P, G, N = x.shape[0], *x.shape[2:], *C.shape[3:]
    reads = (
        shard.rows_before(C[:, :, 0].flatten(2), 1, cuts),
        shard.rows_after(C[:, :, 1].flatten(2), 1, cuts),
    )
    flipped = [z[:, :, 1].flip(1) for z in (dt, B)]
    elements = (
        ssd_summary(x, dt[:, :, 0], A, B[:, :, 0], cu_seqlens=None if cuts is None else torch.tensor(cuts)),
        ssd_summary(
            x.flip(1), flipped[0], A, flipped[1],
            cu_seqlens=None if cuts is None else torch.tensor(shard.mirrored(cuts)),
        ),
    )  # fmt: skip
    none = torch.zeros_like(elements[0].b)
    states = shard.incoming_states(elements, (none, none))
    said = [
        torch.einsum("bgrnp,bgn->bgrp", state.unflatten(1, (G, H // G)), read.view(batch, G, N).to(state.dtype))
        for state, read in zip(states, reads, strict=True)
    ]
    n = batch if cuts is None else len(cuts) - 1
    rest = none.new_zeros(n - batch, H, N, P)  # later documents start afresh
    return _Edges(torch.cat([states[0], rest, states[1], rest]), *(y.reshape(batch, 1, H, P).to(x.dtype) for y in said))
