"""The delta rule: linear attention that reads before it writes, and writes only the correction."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.algebra import Matrix
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document, last_document
from zoo.ops.core.recompute import no_recompute
from zoo.ops.linear_attention.delta_rule.across import delta_rule_across
from zoo.ops.linear_attention.delta_rule.chunked import delta_rule_chunked, delta_rule_step
from zoo.ops.linear_attention.delta_rule.reference import delta_rule_reference

__all__ = ["delta_rule", "delta_rule_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.linear_attention.delta_rule import kernels


@no_recompute
@dispatch.keeps_its_precision
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
    name = "delta_rule"
    sizes = check.shapes(
        name,
        {
            "q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "beta": (beta, "B T H"), "g": (g, "B T H"),
        },
    )  # fmt: skip
    B, T, H, K, V = (sizes[dim] for dim in "BTHKV")
    check.same_dtype(name, q=q, k=k, v=v)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, B, T)
    n = B if cuts is None else len(cuts) - 1
    dtype = dispatch.state_dtype(q)
    if state is None:
        state = q.new_zeros(n, H, K, V, dtype=dtype)
    check.shapes(name, {"state": (state, "N H K V"), "q": (q, "B T H K")}, N=n, H=H, K=K, V=V)
    state = state.to(dtype)
    scale = K**-0.5 if scale is None else scale

    chosen = _backend(backend, q)
    if chosen == "torch" and (crossing := shard.crossing(Matrix, n > B)) is not None:
        return delta_rule_across(crossing, q, k, v, beta, g, state, scale, cuts)
    if shard.current() is not None:
        element = _element(*last_document(cuts, k, v, beta, g), dtype=dtype, chosen=chosen)
        state = shard.incoming_state(element, state, n > B)
    return _run(q, k, v, beta, g, state, scale, cuts, chosen)


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
    if T == 1 and cuts is None:
        return delta_rule_step(q, k, v, beta, g, state, scale)
    if chosen == "torch":
        return delta_rule_chunked(q, k, v, beta, g, state, scale, cuts)
    table = chunk_table(B, T, kernels.chunk_size(K, V, q.dtype), cuts, q.device)
    return kernels.delta_fwd(q, k, v, beta, g, state, table.begin, table.end, table.offsets, scale)


def _backend(backend: str, q: Tensor) -> str:
    """What runs; kernels hold keys up to a size and compute in float32."""
    chosen = dispatch.resolve("delta_rule", backend, q)
    if chosen == "triton" and q.dtype == torch.float64:
        if backend == "auto":
            return "torch"
        raise ValueError(
            "delta_rule: the kernels compute in float32; got float64 tensors, use backend='torch' for them"
        )
    if chosen == "triton" and q.shape[-1] > kernels.MAX_K:
        raise ValueError(
            f"delta_rule: the kernels take keys of at most {kernels.MAX_K} numbers per head; got K = {q.shape[-1]}, "
            "use more heads or backend='torch'"
        )
    return chosen


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
    name = "delta_rule_summary"
    args = {"k": (k, "B T H K"), "v": (v, "B T H V"), "beta": (beta, "B T H"), "g": (g, "B T H")}
    sizes = check.shapes(name, args)
    check.same_dtype(name, k=k, v=v)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    last = last_document(cuts, k, v, beta, g)
    element = _element(*last, dtype=dispatch.state_dtype(k), chosen=_backend(backend, k))
    return element if cuts is None or len(cuts) == 2 else element.reset_to(element.b)


def _element(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *, dtype: torch.dtype, chosen: str) -> Matrix:
    """The columns of a memory run apart, so that columns of zeros that start as the identity become M."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    identity = Matrix.identity(k.new_zeros(B, H, K, V, dtype=dtype))
    wide = torch.cat([v, v.new_zeros(B, T, H, K)], dim=-1)
    _, S = _run(k, k, wide, beta, g, torch.cat([identity.b, identity.M], dim=-1), 1.0, None, chosen)
    return Matrix(S[..., V:], S[..., :V])
