"""Softmax attention: the baseline that every efficient mixer is measured against, and a partner in hybrids."""

import torch
from torch import Tensor

from zoo.ops import check, dispatch, shard
from zoo.ops.attention.reference import attention_reference
from zoo.ops.attention.sdpa import attention_sdpa

BACKENDS = ("auto", "torch", "reference")


@dispatch.keeps_its_precision
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend: o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys that query i may see.

    Queries stand at the end of the keys: query i has position S - T + i, so that T < S continues a cached sequence.

    Args:
        q: queries, (B, T, H, K).
        k: keys, (B, S, Hk, K), H a multiple of Hk (grouped queries share keys).
        v: values, (B, S, Hk, V).
        causal: see only keys at or before the query's position.
        window: see only the `window` nearest positions, the query's own included (0 <= i - j < window if causal).
        scale: K**-0.5 when omitted.
        key_lengths: (B,) integers: only the last key_lengths[b] keys of row b exist (a right-aligned cache).
        cu_seqlens: boundaries (n + 1,) of packed queries, B = 1; documents do not see each other.
        cu_seqlens_k: boundaries of packed keys when they differ from the queries' (cached keys before each document).
        backend: "auto" or "torch" (torch's SDPA), or "reference".

    Returns:
        o: (B, T, H, V), in the dtype of q. A query that sees no key gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices disagree, window < 1, or an unknown backend.

    Cost: O(B H T S (K + V)); windows O(B H T window (K + V)), memory without any T x S mask when T = S.
    Source: arXiv 1706.03762; grouped queries arXiv 2305.13245. Engine: torch's scaled_dot_product_attention.
    """
    name = "attention"
    shard.refuse(name)
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    sizes = check.shapes(name, {"q": (q, "B T H K"), "k": (k, "B S Hk K"), "v": (v, "B S Hk V")})
    check.same_dtype(name, q=q, k=k, v=v)
    if sizes["H"] % sizes["Hk"]:
        raise ValueError(
            f"{name}: the number of query heads must be a multiple of key heads; got {sizes['H']}, {sizes['Hk']}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{name}: window must be at least 1 (it counts the query's own position); got {window}")
    run = attention_reference if backend == "reference" else attention_sdpa
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{name}: cu_seqlens_k needs cu_seqlens; got only the keys' boundaries")
        if causal and sizes["T"] > sizes["S"]:
            raise ValueError(
                f"{name}: queries are the last of the keys, so T <= S; got T = {sizes['T']}, S = {sizes['S']}"
            )
        return run(q, k, v, causal, window, scale, key_lengths)

    cuts = check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    keys = cuts if cu_seqlens_k is None else check.boundaries(name, cu_seqlens_k, sizes["B"], sizes["S"])
    if len(keys) != len(cuts) or key_lengths is not None:
        raise ValueError(f"{name}: packed queries and keys must have the same documents and no key_lengths")
    outputs = []
    for i in range(len(cuts) - 1):
        if cuts[i] < cuts[i + 1]:
            here, seen = slice(cuts[i], cuts[i + 1]), slice(keys[i], keys[i + 1])
            outputs.append(run(q[:, here], k[:, seen], v[:, seen], causal, window, scale, None))
    return torch.cat(outputs, dim=1) if outputs else q.new_zeros(*q.shape[:3], sizes["V"])
