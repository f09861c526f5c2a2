"""Gated linear attention: a matrix-valued memory with a decay per key channel."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Diagonal
from zoo.ops.core.call import Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.linear_attention.gated_linear_attention.chunked import (
    gated_linear_attention_chunked,
    gated_linear_attention_step,
)
from zoo.ops.linear_attention.gated_linear_attention.reference import gated_linear_attention_reference

__all__ = ["gated_linear_attention", "gated_linear_attention_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.linear_attention.gated_linear_attention import kernels


OPERATOR = Operator("gated_linear_attention", cp_kind="affine")


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None, *, scale: float | None = None,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    K, V = q.shape[-1], v.shape[-1]
    if state is None:
        state = q.new_zeros(*q.shape[::2], K, V)
    return gated_linear_attention_step(q, k, v, g, state, K**-0.5 if scale is None else scale)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"q": 2, "k": 2, "v": 2, "g": 2})
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and write a decaying memory: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T (scale q_t).

    Args:
        q, k: queries and keys, (B, T, H, K), any float dtype, shared by q, k and v. Any K and V.
        v: values, (B, T, H, V).
        g: log decay of each key channel, (B, T, H, K), <= 0 (not checked); its dtype may differ, float32 is best.
        state: the memory before the first token, (B, H, K, V); zeros when omitted. With packed documents (n, H, K, V).
        scale: factor on q; K**-0.5 when omitted.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single token), "triton", "torch" or
            "reference".

    Returns:
        o: (B, T, H, V), in the dtype of v.
        S: the memory after the last token, (B, H, K, V) or (n, H, K, V), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: O(B T H K V) operations by chunks; the state is K V numbers per head. Sums and states are float32 at least.
    Source: arXiv 2312.06635, equations 3 to 8; the scale is the official code's.
    """
    args = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "g": (g, "B T H K")}
    call = OPERATOR.begin(args, alike=("q", "k", "v"), cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "H K V")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.current() is not None:
        state = shard.incoming_state(_element(*call.last_document(k, v, g)), state, call.several)
    if call.backend == "reference":
        return each_document(
            lambda q, k, v, g, S: gated_linear_attention_reference(q, k, v, g, S, scale), call.cuts, (q, k, v, g), state
        )
    if call.one_token:
        return gated_linear_attention_step(q, k, v, g, state, scale)
    if call.backend == "triton":
        begin, end, _, offsets = chunk_table(q.shape[0], q.shape[1], kernels.CHUNK, call.cuts, q.device)
        result: tuple[Tensor, Tensor] = kernels.gla_fwd(q, k, v, g, state, begin, end, offsets, scale)
        return result
    return gated_linear_attention_chunked(q, k, v, g, state, scale, call.cuts)


@dispatch.keeps_its_precision
def gated_linear_attention_summary(k: Tensor, v: Tensor, g: Tensor, *, cu_seqlens: Tensor | None = None) -> Diagonal:
    """What a stretch of time does to any memory: S -> diag(exp(log_a)) S + b.

    Args:
        k, v, g: as for `gated_linear_attention`.
        cu_seqlens: boundaries of packed documents, B = 1: the memory enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        log_a (B, H, K) and b (B, H, K, V), float32 (float64 for float64 inputs); `apply` gives the final memory.

    Cost: one matrix product over the last document. Differentiable.
    """
    args = {"k": (k, "B T H K"), "v": (v, "B T H V"), "g": (g, "B T H K")}
    call = OPERATOR.begin(args, alike=("k", "v"), cu_seqlens=cu_seqlens, name="gated_linear_attention_summary")
    return call.bordered(_element(*call.last_document(k, v, g)))


def _element(k: Tensor, v: Tensor, g: Tensor) -> Diagonal:
    """Token t reaches the end through the decay of all later tokens, a sum that ends at 0: exponents are <= 0."""
    dtype = dispatch.state_dtype(k)
    k, v, g = (x.to(dtype) for x in (k, v, g))
    later = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], dim=1)
    later = later.flip(1).cumsum(1).flip(1)  # (B, T, H, K): the sum of g after t
    return Diagonal(g.sum(1), torch.einsum("bthk,bthv->bhkv", k * later.exp(), v))
