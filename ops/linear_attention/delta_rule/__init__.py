"""The delta rule: linear attention that reads before it writes, and writes only the correction."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Matrix
from zoo.ops.core.call import Limit, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.linear_attention.delta_rule.across import delta_rule_across
from zoo.ops.linear_attention.delta_rule.chunked import delta_rule_chunked, delta_rule_step
from zoo.ops.linear_attention.delta_rule.reference import delta_rule_reference

__all__ = ["delta_rule", "delta_rule_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.linear_attention.delta_rule import kernels


MAX_K = 256  # keys of one head live in one block of the sequential kernels

OPERATOR = Operator("delta_rule", cp_kind="affine", limits=[Limit("K", MAX_K, "keys", "use more heads")])


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None, *,
    scale: float | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    K, V = q.shape[-1], v.shape[-1]
    if state is None:
        state = q.new_zeros(*q.shape[::2], K, V)
    return delta_rule_step(q, k, v, beta, g, state, K**-0.5 if scale is None else scale)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"q": 2, "k": 2, "v": 2, "beta": 2, "g": 2})
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run S' = exp(g_t) S; u = beta_t (v_t - S'^T k_t); S = S' + k_t u^T; o_t = S^T (scale q_t) along time.

    Without g this is DeltaNet's rule, with g Gated DeltaNet's. The state stays bounded when beta_t |k_t|^2 <= 2.

    Args:
        q, k: queries and keys, (B, T, H, K), of one float dtype with v. Keys are used as they come: normalise before.
        v: values, (B, T, H, V).
        beta: write strength per token and head, (B, T, H), usually in (0, 1), or (0, 2) to allow reflections.
        g: log decay per token and head, (B, T, H), <= 0; None for no decay. beta and g may have a wider dtype than q.
        state: the memory before the first token, (B, H, K, V); zeros when omitted. With packed documents (n, H, K, V).
        scale: factor on q; K**-0.5 when None.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA, else torch; float64 always torch), "triton", "torch" or "reference".

    Returns:
        o: (B, T, H, V), in the dtype of v.
        S: the memory after the last token, (B, H, K, V) or (n, H, K, V), in float32 (float64 for float64 inputs); feed
            it back as `state`.

    Raises:
        ValueError: shapes, dtypes or devices disagree, keys too large for the kernels (K > 256), or the
            backend cannot run here.

    Cost: O(T (C K + C V + K V + C^2)) per head with chunks of C tokens. States and triangular factors are float32.
    Source: DeltaNet, arXiv 2406.06484, section 3; Gated DeltaNet, arXiv 2412.06464, section 3.
    """
    args = {
        "q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "beta": (beta, "B T H"), "g": (g, "B T H"),
    }  # fmt: skip
    call = OPERATOR.begin(args, alike=("q", "k", "v"), cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "H K V")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if call.backend == "torch" and (crossing := shard.crossing(Matrix, call.several)) is not None:
        return delta_rule_across(crossing, q, k, v, beta, g, state, scale, call.cuts)
    if shard.current() is not None:
        element = _element(*call.last_document(k, v, beta, g), chosen=call.backend)
        state = shard.incoming_state(element, state, call.several)
    chosen = "torch" if call.one_token else call.backend
    return _run(q, k, v, beta, g, state, scale, call.cuts, chosen)


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    cuts: tuple[int, ...] | None, chosen: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checked arguments, through the form that was chosen."""
    (B, T, _, K), V = q.shape, v.shape[-1]
    if T == 0:
        chosen = "torch"  # nothing to compute, but the graph must reach every argument: its exchanges have a backward
    if chosen == "reference":
        return each_document(
            lambda q, k, v, beta, g, S: delta_rule_reference(q, k, v, beta, g, S, scale),
            cuts,
            (q, k, v, beta, g),
            state,
        )
    if chosen == "torch" and T == 1 and cuts is None:
        return delta_rule_step(q, k, v, beta, g, state, scale)
    if chosen == "torch":
        return delta_rule_chunked(q, k, v, beta, g, state, scale, cuts)
    table = chunk_table(B, T, kernels.chunk_size(K, V, q.dtype), cuts, q.device)
    result: tuple[Tensor, Tensor] = kernels.delta_fwd(
        q, k, v, beta, g, state, table.begin, table.end, table.offsets, scale
    )
    return result


@dispatch.keeps_its_precision
def delta_rule_summary(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Matrix:
    """What a stretch of time does to any memory: S -> M S + b.

    Args:
        k, v, beta, g: as for `delta_rule`.
        cu_seqlens: boundaries of packed documents, B = 1: the memory enters the first and leaves the last document, so
            that a border between them forgets everything.
        backend: as for `delta_rule`.

    Returns:
        M (B, H, K, K) and b (B, H, K, V), float32 (float64 for float64 inputs); `apply` gives the final memory.

    Cost: `delta_rule` over the last document with K more columns of values. Differentiable.
    """
    args = {"k": (k, "B T H K"), "v": (v, "B T H V"), "beta": (beta, "B T H"), "g": (g, "B T H")}
    call = OPERATOR.begin(args, alike=("k", "v"), cu_seqlens=cu_seqlens, backend=backend, name="delta_rule_summary")
    return call.bordered(_element(*call.last_document(k, v, beta, g), chosen=call.backend))


def _element(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *, chosen: str) -> Matrix:
    """The columns of a memory run apart, so that columns of zeros that start as the identity become M."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    identity = Matrix.identity(k.new_zeros(B, H, K, V, dtype=dispatch.state_dtype(k)))
    wide = torch.cat([v, v.new_zeros(B, T, H, K)], dim=-1)
    _, S = _run(k, k, wide, beta, g, torch.cat([identity.b, identity.M], dim=-1), 1.0, None, chosen)
    return Matrix(S[..., V:], S[..., :V])
