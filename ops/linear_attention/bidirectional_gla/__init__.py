"""Bidirectional gated linear attention (ViG): one memory from each end, with gates of its own; queries read both."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Diagonal
from zoo.ops.core.call import Operator
from zoo.ops.linear_attention.bidirectional_gla.reference import bidirectional_gla_reference
from zoo.ops.linear_attention.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary

__all__ = ["bidirectional_gla"]

DIRECTIONS = 2

OPERATOR = Operator("bidirectional_gla", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"q": 2, "k": 2, "v": 2, "g": 3})
def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix time by o_t = (S_t + R_t)^T (scale q_t) / 2, with a memory S from the left and a memory R from the right.

    S_t = diag(exp(g_t0)) S_{t-1} + k_t v_t^T, and R_t = diag(exp(g_t1)) R_{t+1} + k_t v_t^T. The same keys and values
    are written to both memories, and both hold token t's own when its query reads them.

    Args:
        q, k: queries and keys, (B, T, H, K), any float dtype, shared with v.
        v: values, (B, T, H, V).
        g: log decays of both directions, (B, T, 2, H, K), <= 0 (not checked); first those from the left.
        scale: of the queries; K**-0.5 when omitted.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; nothing crosses a border in either direction.
        backend: "auto", "triton" or "torch", of `gated_linear_attention`, or "reference": two loops.

    Returns:
        o: (B, T, H, V), in the dtype of v. There is no state: the outputs need both ends.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend cannot run here, or the reference is asked for where
            time is cut across ranks.

    Cost: twice that of `gated_linear_attention`, in one call on both orders of the tokens: q, k and v are copied twice.
        Across ranks each receives a memory from either side, both at once.
    Source: arXiv 2405.18425, section 3.
    """
    args = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "g": (g, "B T 2 H K")}
    call = OPERATOR.begin(
        args, alike=("q", "k", "v"), known={"2": DIRECTIONS}, cu_seqlens=cu_seqlens, backend=backend
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        shard.refuse("The two loops of bidirectional gated linear attention")
        dtype = dispatch.state_dtype(q)
        q, k, g = (x.to(dtype) for x in (q, k, g))
        return bidirectional_gla_reference(q, k, v.to(dtype), g, scale, call.cuts).to(v.dtype)
    if q.shape[1] == 0 and shard.current() is None:
        return torch.zeros_like(v)
    return _two_scans(q, k, v, g, scale, call.cuts, backend)


def _two_scans(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cuts: tuple[int, ...] | None, backend: str
) -> Tensor:
    """Both directions as one call: side by side in the batch, or one after the other as packed documents."""
    T, side = q.shape[1], 0 if cuts is None else 1
    both = None
    if cuts is not None:  # on the CPU: only the host reads boundaries, and it has just read these
        both = torch.tensor([*cuts, *(T + cut for cut in shard.mirrored(cuts)[1:])])
    left, right = g.unbind(2)
    q2, k2, v2, g2 = (torch.cat([a, b.flip(1)], dim=side) for a, b in ((q, q), (k, k), (v, v), (left, right)))
    states = None if shard.current() is None else _across(k, v, left, right, cuts)
    with shard.unsharded():
        o, _ = gated_linear_attention(q2, k2, v2, g2, states, scale=scale / 2, cu_seqlens=both, backend=backend)
    forward, backward = o.chunk(2, dim=side)
    return forward + backward.flip(1)


def _across(k: Tensor, v: Tensor, left: Tensor, right: Tensor, cuts: tuple[int, ...] | None) -> Tensor:
    """What enters a stretch of time on both sides, (2 n, H, K, V): first for every row or document from the left."""

    def summary(k: Tensor, v: Tensor, g: Tensor, cuts: tuple[int, ...] | None) -> Diagonal:
        return gated_linear_attention_summary(k, v, g, cu_seqlens=None if cuts is None else torch.tensor(cuts))

    elements = (
        summary(k, v, left, cuts),
        summary(k.flip(1), v.flip(1), right.flip(1), None if cuts is None else shard.mirrored(cuts)),
    )
    none = torch.zeros_like(elements[0].b)
    states = shard.incoming_states(elements, (none, none))
    n = k.shape[0] if cuts is None else len(cuts) - 1
    rest = none.new_zeros(n - k.shape[0], *none.shape[1:])  # later documents start afresh
    return torch.cat([states[0], rest, states[1], rest])
