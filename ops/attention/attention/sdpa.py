"""Attention by torch's scaled_dot_product_attention: one call, or blocks of queries for windows."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.attention.attention.reference import real_keys, visible, visible_slots

# Queries of a windowed layer go in blocks of this many, so that memory is O(T * window) and no T x T mask exists.
WINDOW_BLOCK = 256
# From a mask of this many entries on, our blocks run instead of SDPA, which would build and read it whole. One core of
# a shared CPU, float32, 4 heads of 64, ms of its own time for forward + backward, median of 5, SDPA | blocks:
#   key_lengths: T 256, B 8: 21 | 28;   T 1024, B 2: 182 | 148     no mask:     T 2048, B 2: 399 | 536
#   window 64, T 256, B 4: 9 | 17;  128, T 1024, B 2: 70 | 95;  512, T 2048, B 2: 280 | 317;  1024, T 4096: 468 | 535
# (medians spread by a tenth). Causal windows are SDPA's, in blocks of queries: they need no square mask.
MASK_LIMIT = 2**20


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None,
    past: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, T, H, K), (B, S, Hk, K), (B, S, Hk, V) -> (B, T, H, V); queries at the end of the keys, or at `past`."""
    T, S = q.shape[1], k.shape[1]
    if scale < 0:  # torch's CPU kernel takes the largest product for the largest score, and gives NaN
        q, scale = -q, -scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
    if past is not None:
        mask, gqa = visible_slots(past, T, S, window), q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa).transpose(1, 2)
    if window is not None and window >= max(T, S):
        window = None
    if window is not None and causal and T > WINDOW_BLOCK:
        outputs = []
        for i in range(0, T, WINDOW_BLOCK):
            j = min(i + WINDOW_BLOCK, T)
            first, last = max(0, S - T + i - window + 1), S - T + j  # the keys that queries i ... j - 1 may see
            lengths = None if key_lengths is None else (key_lengths - (S - last)).clamp(min=0, max=last - first)
            block = k[:, :, first:last], v[:, :, first:last]
            outputs.append(_call(q[:, :, i:j], *block, causal, window, scale, lengths))
        return torch.cat(outputs, dim=2).transpose(1, 2)
    return _call(q, k, v, causal, window, scale, key_lengths).transpose(1, 2)


def builds_a_large_mask(T: int, S: int, causal: bool, window: int | None, key_lengths: Tensor | None) -> bool:
    """Would `attention_sdpa` build one mask of MASK_LIMIT entries or more?"""
    if window is not None and window < max(T, S):
        square = not causal or T <= WINDOW_BLOCK
    else:
        square = key_lengths is not None or (causal and T not in (1, S))
    return square and T * S >= MASK_LIMIT


def past_mask_is_large(sizes: Mapping[str, int]) -> bool:
    """Would the mask of queries at `past` have MASK_LIMIT entries or more? That of one token a row never counts."""
    return sizes["T"] > 1 and sizes["B"] * sizes["T"] * sizes["S"] >= MASK_LIMIT


def _call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None
) -> Tensor:
    """One SDPA call on head-first tensors, with the cheapest mask that says what is meant."""
    T, S = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if key_lengths is None and window is None and (not causal or T == S or T == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1, scale=scale, enable_gqa=gqa)
    mask = visible(T, S, causal, window, q.device)[None, None]
    if key_lengths is not None:
        mask = mask & real_keys(key_lengths, S)
        blind = ~mask.any(dim=-1, keepdim=True)  # a query that sees no key: give it all keys, then take its output away
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=gqa)
        return out.masked_fill(blind, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
