"""Softmax attention: the baseline that every efficient mixer is measured against, and a partner in hybrids."""

import itertools
import math
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import attention_blockwise
from zoo.ops.attention.attention.named import Mask, named_mask
from zoo.ops.attention.attention.parallel import attention_across
from zoo.ops.attention.attention.reference import attention_reference, right_aligned
from zoo.ops.attention.attention.sdpa import attention_sdpa, builds_a_large_mask, past_mask_is_large
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.attention.attention.visible_blocks import attention_visible
from zoo.ops.core import check, dispatch
from zoo.ops.core.call import Choice, Limit, Operator
from zoo.ops.shard.scope import scope

__all__ = ["Visible", "attention"]

if dispatch.HAS_TRITON:
    from zoo.ops.attention.attention import kernels

MAX_HEAD = 256  # a block holds whole heads: larger ones leave no registers for the scores

OPERATOR = Operator(
    "attention",
    cp_kind="attention",
    limits=[Limit(size, MAX_HEAD, "heads") for size in ("K", "V")],
)
SDPA = Choice("torch", "SDPA needs no mask for this call")
FEW = Choice("torch", "few queries over a cache, whose mask is small")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@OPERATOR.public()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    visible: Visible | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend: o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys that query i may see.

    Queries stand at the end of the keys: query i has position S - T + i, so that T < S continues a cached sequence.

    Args:
        q: queries, (B, T, H, K).
        k: keys, (B, S, Hk, K), H a multiple of Hk (grouped queries share keys).
        v: values, (B, S, Hk, V).
        causal: see only keys at or before the query's position; then T <= S, in every document.
        window: see only the `window` nearest positions, the query's own included: 0 <= i - j < window if causal,
            |i - j| < window if not.
        scale: K**-0.5 when omitted.
        key_lengths: (B,) integers in [0, S]: only the last key_lengths[b] keys of row b exist (a right-aligned cache).
        past: (B,) integers in [0, S - T]: keys are slots filled from the left, and query i of row b has position
            past[b] + i in them (a left-aligned cache). Slots behind a row's last query may hold anything finite.
        cu_seqlens: boundaries (n + 1,) of packed queries, B = 1; documents do not see each other.
        cu_seqlens_k: boundaries of packed keys when they differ from the queries' (cached keys before each document).
        visible: which keys each query sees, in place of causal, window, past, and of lengths and boundaries, for bands,
            trees, two streams and whatever else intervals can say; T and S may be any. "torch" goes by blocks in
            O(T + S) memory, "triton" is our kernels. Keys that nobody sees must be finite, too.
        return_lse: also return the log-sum-exp, with which `zoo.ops.core.algebra.LogSumExp` merges partial results over
            disjoint keys.
        backend: "auto", "torch", "triton" or "reference". "torch" is torch's SDPA, or our blocks in plain torch where
            the log-sum-exp is asked for or they are faster. "triton" is our kernels, for heads of at most 256. "auto"
            is "torch" on a CPU; on CUDA it is our kernels where SDPA would need a T x S mask (windows, packed
            documents, key_lengths with T > 1) or has no log-sum-exp to give, and "torch" for the rest, for float64, and
            for larger heads (said once). The choice on CUDA is not timed on a device yet.

    Under `zoo.ops.shard.use(...)` q, k and v are one rank's own tokens, and o and lse are of its queries over the keys
    of all ranks, by the shard's `attention` method. Documents are then the shard's `documents`, with or without
    `cu_seqlens`, the rank's view of them. Partial results, sums of gradients and what travels of them are float32.
        "allgather": all keys to every rank, one call, no merge; any layout.
        "ring": keys go round, P - 1 hops; "zigzag" and "striped" are rings over the layouts that balance causal work.
        "ulysses": heads are shared out by all-to-alls; at least one query head a rank, key heads repeated as needed.
        "usp": the same among `inner` neighbouring ranks, and a ring across; contiguous or zigzag.
        "tokenring": queries go round and their answers come straight home; the better layout is zigzag.
        "lightseq": early ranks help late ones, P // 2 + 1 steps; contiguous and causal.
    A `visible` goes by "allgather" or a ring, in any layout, with the labels of the rank's own queries and the
    intervals of its own keys. With a window in a contiguous layout only the keys that it reaches travel, by any method
    that does not share out heads. What each method moves is in `zoo.ops.attention.attention.parallel`. Recomputation of
    activations reads (o, lse) back.

    Returns:
        o: (B, T, H, V), in the dtype of q. A query that sees no key gives zeros.
        lse: with return_lse, L_i = log sum_j exp(scale q_i . k_j), natural logarithm, (B, T, H), float32 (float64 for
            float64 inputs); -inf for a query that sees no key. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, window < 1, an unknown backend, or one that cannot run here; or
            the shard's method cannot take these heads, layout or mask.

    Cost: 2 H (K + V) operations for each query and key that see each other, 2.5 times that backward; no T x S matrix is
    kept, except a mask for key_lengths with few queries. Kernels and blocks accumulate in float32.
    Source: arXiv 1706.03762; grouped queries arXiv 2305.13245; blocks and kernels arXiv 2307.08691;
        across ranks arXiv 2310.01889 (ring), 2311.09431 (striped), 2309.14509 (ulysses), 2405.07719 (usp), 2412.20501
        (tokenring), 2310.03294 (lightseq).
    """
    name = "attention"
    sizes = check.shapes(name, {"q": (q, "B T H K"), "k": (k, "B S Hk K"), "v": (v, "B S Hk V")})
    B, T, S, H, Hk, K = (sizes[dim] for dim in ("B", "T", "S", "H", "Hk", "K"))
    check.same_dtype(name, q=q, k=k, v=v)
    if not Hk or H % Hk:
        raise ValueError(f"{name}: the number of query heads must be a multiple of key heads; got {H}, {Hk}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"{name}: window must be an integer of at least 1 (it counts the query's own position) or None for all; "
            f"got {window!r}"
        )
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"{name}: scale must be a finite number or None for K**-0.5; got {scale!r}")
    scale = K**-0.5 if scale is None else float(scale)
    place = scope()
    if visible is not None:
        others = {
            "window": window, "key_lengths": key_lengths, "past": past, "cu_seqlens": cu_seqlens,
            "cu_seqlens_k": cu_seqlens_k,
        }  # fmt: skip
        _check_visible(name, sizes, visible, others, q.device)
        if place is not None and place.shard.size > 1:
            _across_ranks(name, sizes, None, None, None, None, None, backend)
            OPERATOR.decide(backend, q, sizes, problem="blocks across ranks run in plain torch")
            o, lse = attention_across(place, q, k, v, False, None, scale, visible)
            return (o, lse) if return_lse else o
        chosen = OPERATOR.decide(backend, q, sizes).backend
        if chosen == "triton":
            o, lse = kernels.attention_kernels(q, k, v, Mask(visible), scale)
            return (o, lse) if return_lse else o
        o, lse = (_by_definition if chosen == "reference" else attention_visible)(q, k, v, visible, scale)
        return (o, lse) if return_lse else o
    if place is not None and place.shard.size > 1:
        _across_ranks(name, sizes, cu_seqlens, cu_seqlens_k, key_lengths, past, place.shard.documents, backend)
        OPERATOR.decide(backend, q, sizes, problem="blocks across ranks run in plain torch")
        o, lse = attention_across(place, q, k, v, causal, window, scale)
        return (o, lse) if return_lse else o
    if place is not None and place.shard.documents is not None and cu_seqlens is None:
        cu_seqlens = torch.tensor(place.shard.documents, device=q.device)
    if past is not None:
        _check_past(name, sizes, causal, past, {"key_lengths": key_lengths, "cu_seqlens": cu_seqlens}, q.device)
        if return_lse or backend not in ("auto", "torch", "reference") or past_mask_is_large(sizes):
            k, v, key_lengths, past = *right_aligned(k, v, past + T), past + T, None
        else:  # few queries: SDPA's mask of B x T x S entries costs less than moving the slots
            OPERATOR.decide(backend, q, sizes, instead=lambda: FEW)
            masks = causal, window, scale, None, past
            return (
                attention_reference(q, k, v, *masks)[0] if backend == "reference" else attention_sdpa(q, k, v, *masks)
            )
    cuts, keys = _documents(name, sizes, causal, cu_seqlens, cu_seqlens_k, key_lengths, q.device)
    if window is not None and window >= max(S, T):
        window = None

    masked = window is not None or cuts is not None or (key_lengths is not None and T > 1)
    direct = dispatch.on_cuda(q) and not (masked or return_lse)
    chosen = OPERATOR.decide(backend, q, sizes, instead=lambda: SDPA if direct else None).backend
    if chosen == "triton":
        mask = named_mask(B, T, S, causal, window, key_lengths, cuts, keys, q.device)
        o, lse = kernels.attention_kernels(q, k, v, mask, scale)
        return (o, lse) if return_lse else o

    outputs, sums = [], []
    for here, seen in _slices(cuts, keys):
        document = q[:, here], k[:, seen], v[:, seen], causal, window, scale, key_lengths
        if chosen == "reference" or return_lse or _blocks_are_faster(*document):
            o, lse = (attention_reference if chosen == "reference" else attention_blockwise)(*document)
            sums.append(lse)
        else:
            o = attention_sdpa(*document)
        outputs.append(o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return (o, sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)) if return_lse else o


def _by_definition(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> tuple[Tensor, Tensor]:
    return attention_reference(q, k, v, False, None, scale, None, seen=visible.dense()[:, None])


def _check_visible(
    name: str, sizes: dict[str, int], visible: Visible, others: Mapping[str, object], device: torch.device
) -> None:
    """Refuse a Visible of other queries or keys, or beside another mask.

    Raises:
        ValueError: as said.
    """
    given = [argument for argument, value in others.items() if value is not None]
    if given:
        raise ValueError(f"{name}: visible says all that is seen; leave out {', '.join(given)}")
    B, T, S = sizes["B"], sizes["T"], sizes["S"]
    rows, queries, keys = *visible.label.shape, visible.first.shape[1]
    if rows not in (1, B) or (queries, keys) != (T, S) or visible.label.device != device:
        raise ValueError(
            f"{name}: visible must be of B = {B} rows or one, T = {T} queries and S = {S} keys on {device}; got {rows} "
            f"rows, {queries} queries and {keys} keys on {visible.label.device}"
        )


def _across_ranks(
    name: str,
    sizes: dict[str, int],
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    past: Tensor | None,
    documents: tuple[int, ...] | None,
    backend: str,
) -> None:
    """Refuse what a sequence that is cut across ranks cannot have."""
    T, S = sizes["T"], sizes["S"]
    others = {"cu_seqlens_k": cu_seqlens_k, "key_lengths": key_lengths, "past": past}
    given = [argument for argument, value in others.items() if value is not None]
    if T != S or given:
        raise ValueError(
            f"{name}: across ranks every rank gives the keys of its own queries and no others; got "
            f"{', '.join([f'T = {T}, S = {S}', *given])}, run cached decoding outside zoo.ops.shard.use(...)"
        )
    if cu_seqlens is not None and documents is None:
        raise ValueError(
            f"{name}: documents that cross ranks are bounded in the whole stream, and cu_seqlens is one rank's view; "
            "give SequenceShard documents"
        )
    if backend == "reference":
        raise ValueError(f"{name}: blocks across ranks run in plain torch; got backend 'reference', use 'auto'")


def _slices(cuts: tuple[int, ...] | None, keys: tuple[int, ...] | None) -> list[tuple[slice, slice]]:
    """Queries and keys of each document that has queries; everything when there is nothing to cut."""
    if cuts is None or keys is None or cuts[-1] == 0:
        return [(slice(None), slice(None))]
    ends = zip(itertools.pairwise(cuts), itertools.pairwise(keys), strict=True)
    return [(slice(*here), slice(*seen)) for here, seen in ends if here[0] < here[1]]


def _documents(
    name: str,
    sizes: dict[str, int],
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The boundaries of queries and keys, checked; None twice for a batch."""
    B, T, S = sizes["B"], sizes["T"], sizes["S"]
    if key_lengths is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{name}: packed documents take no key_lengths; say where keys begin by cu_seqlens_k")
        _check_rows(name, "key_lengths", key_lengths, B, device)
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{name}: cu_seqlens_k needs cu_seqlens; got only the keys' boundaries")
        if causal and T > S:
            raise ValueError(
                f"{name}: queries are the last of the keys, so T <= S; got T = {T}, S = {S}, or set causal=False"
            )
        return None, None
    cuts = check.boundaries(name, cu_seqlens, B, T)
    keys = check.boundaries(name, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, B, S)
    if len(keys) != len(cuts):
        raise ValueError(
            f"{name}: cu_seqlens and cu_seqlens_k must bound the same documents; "
            f"got {len(cuts) - 1} and {len(keys) - 1}"
        )
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        if causal and right - left > keys[i + 1] - keys[i]:
            raise ValueError(
                f"{name}: queries are the last of the keys in every document; document {i} has {right - left} queries "
                f"and {keys[i + 1] - keys[i]} keys, or set causal=False"
            )
    return cuts, keys


def _check_rows(name: str, argument: str, value: Tensor, B: int, device: torch.device) -> None:
    integers = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    if not integers or value.shape != (B,) or value.device != device:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
        raise ValueError(f"{name}: {argument} must be int32 or int64 ({B},), one a row, on {device}; got {got}")


def _check_past(
    name: str, sizes: dict[str, int], causal: bool, past: Tensor, others: dict[str, Tensor | None], device: torch.device
) -> None:
    _check_rows(name, "past", past, sizes["B"], device)
    given = [argument for argument, value in others.items() if value is not None]
    if given or not causal or sizes["T"] > sizes["S"]:
        got = ", ".join([f"T = {sizes['T']}, S = {sizes['S']}, causal={causal}", *given])
        raise ValueError(
            f"{name}: past counts slots before causal queries of a batch, T <= S; got {got}, leave past out"
        )


def _blocks_are_faster(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None
) -> bool:
    """Where our blocks replace SDPA though nobody asks for the log-sum-exp."""
    T, S = q.shape[1], k.shape[1]
    nothing = not T or not S  # SDPA gives NaN where there is nothing to see
    return nothing or builds_a_large_mask(T, S, causal, window, key_lengths)
