"""The definition: decay the memory, read what it holds for the key, write back the correction."""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S' = exp(g_t) S; u = beta_t (v_t - S'^T k_t); S = S' + k_t u^T; o_t = S^T (scale q_t), one step at a time."""
    S, outputs = S0, []  # (B, H, K, V), in its own dtype; every step is computed in it
    dtype, (q, k, v_, beta) = S0.dtype, (x.to(S0.dtype) for x in (q, k, v, beta))
    for t in range(q.shape[1]):
        if g is not None:
            S = g[:, t, :, None, None].to(dtype).exp() * S
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        u = beta[:, t, :, None] * (v_[:, t] - held)
        S = S + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], S))
    return torch.stack(outputs, dim=1).to(v.dtype) if outputs else v[:, :0], S  # (B, T, H, V), (B, H, K, V)
