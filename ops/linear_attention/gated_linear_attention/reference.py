"""The definition: a matrix-valued state that decays per key channel, is written by k v^T and read by q."""

import torch
from torch import Tensor


def gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T (scale q_t), step by step, in the dtype of state."""
    S, out = state, []
    # unbind, not x[:, t]: the gradient of an index is as large as x, at every step
    for q_t, k_t, v_t, g_t in zip(*(x.to(S.dtype).unbind(1) for x in (q, k, v, g)), strict=True):  # (B, H, K) or V
        S = g_t.exp().unsqueeze(-1) * S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # (B, H, K, V)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q_t * scale))
    return torch.stack(out, dim=1).to(v.dtype) if out else torch.zeros_like(v), S
