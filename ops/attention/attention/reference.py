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
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None,
    past: Tensor | None = None, seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_i = sum_j softmax_j(s_ij) v_j and L_i = log sum_j exp(s_ij), s_ij = scale q_i . k_j, over the visible keys j.

    A query that sees none gives zeros and -inf. `seen`, (B or 1, 1, T, S) bool, stands for all other masks.
    """
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # (B, S, H, K)
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    if seen is not None:
        mask = seen.expand(q.shape[0], 1, T, S)
    elif past is None:
        mask = visible(T, S, causal, window, q.device).expand(q.shape[0], 1, T, S)
    else:
        mask = visible_slots(past, T, S, window)
    if key_lengths is not None:
        mask = mask & real_keys(key_lengths, S)
    blind = ~mask.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~mask & ~blind, float("-inf"))  # of a blind query anything finite: it is taken away
    weights = scores.softmax(dim=-1).masked_fill(blind, 0.0)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    lse = scores.logsumexp(dim=-1).masked_fill(blind.squeeze(-1), float("-inf"))
    return o, lse.transpose(1, 2)


def real_keys(key_lengths: Tensor, S: int) -> Tensor:
    """(B, 1, 1, S) bool: the last key_lengths[b] of S keys exist."""
    return (torch.arange(S, device=key_lengths.device) >= S - key_lengths[:, None])[:, None, None]


def visible_slots(past: Tensor, T: int, S: int, window: int | None) -> Tensor:
    """(B, 1, T, S) bool: query i of row b stands at slot past[b] + i and sees it and the slots before it."""
    queries = past[:, None, None] + torch.arange(T, device=past.device)[:, None]
    distance = queries - torch.arange(S, device=past.device)  # (B, T, S)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return mask[:, None]


def right_aligned(k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Slots (B, S, Hk, K or V) filled from the left, moved so that row b's lengths[b] slots are the last ones."""
    S = k.shape[1]
    source = (torch.arange(S, device=k.device) - S + lengths[:, None]).clamp(min=0)[:, :, None, None]
    return k.gather(1, source.expand_as(k)), v.gather(1, source.expand_as(v))
