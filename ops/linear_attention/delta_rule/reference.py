"""The definition: decay the memory, read what it holds for the key, write back the correction."""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S' = exp(g_t) S; u = beta_t (v_t - S'^T k_t); S = S' + k_t u^T; o_t = S^T (scale q_t), one step at a time."""
    S, outputs = S0, []  # (B, H, K, V), in its own dtype; every step is computed in it
    # unbind, not x[:, t]: the gradient of an index is as large as x, at every step
    steps = [x.to(S0.dtype).unbind(1) for x in (q, k, v, beta)]
    decays = [None] * q.shape[1] if g is None else g.to(S0.dtype).unbind(1)
    for q_t, k_t, v_t, beta_t, g_t in zip(*steps, decays, strict=True):  # (B, H, K), (B, H, V) or (B, H)
        if g_t is not None:
            S = g_t[..., None, None].exp() * S
        held = torch.einsum("bhk,bhkv->bhv", k_t, S)
        u = beta_t.unsqueeze(-1) * (v_t - held)
        S = S + k_t.unsqueeze(-1) * u.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q_t, S))
    return torch.stack(outputs, dim=1).to(v.dtype) if outputs else v[:, :0], S  # (B, T, H, V), (B, H, K, V)
