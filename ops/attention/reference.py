"""The definition: a softmax over the keys that each query may see."""

import torch
from torch import Tensor


def visible(T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool: may query i see key j? Query i stands at position S - T + i of the keys (bottom-right aligned)."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    mask = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    return mask


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None
) -> Tensor:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the visible keys; a query that sees none gives zeros."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # (B, S, H, K)
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    mask = visible(T, S, causal, window, q.device).expand(q.shape[0], 1, T, S)
    if key_lengths is not None:
        mask = mask & real_keys(key_lengths, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def real_keys(key_lengths: Tensor, S: int) -> Tensor:
    """(B, 1, 1, S) bool: the last key_lengths[b] of S keys exist."""
    return (torch.arange(S, device=key_lengths.device) >= S - key_lengths[:, None])[:, None, None]
