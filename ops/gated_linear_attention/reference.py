"""The definition: a matrix-valued state that decays per key channel, is written by k v^T and read by q."""

import torch
from torch import Tensor


def gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T (scale q_t), step by step, in the dtype of state."""
    S, out = state, []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, g_t = (x[:, t].to(S.dtype) for x in (q, k, v, g))  # (B, H, K) or (B, H, V)
        S = g_t.exp().unsqueeze(-1) * S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # (B, H, K, V)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q_t * scale))
    return torch.stack(out, dim=1).to(v.dtype) if out else torch.zeros_like(v), S
