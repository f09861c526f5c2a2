"""The definition of pLSTM on a line: the mark reads the state before the token, the direct gate reads the token."""

import torch
from torch import Tensor


def plstm_reference(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, state: Tensor,
    *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """C_t = T_t C_{t-1} + S_t k_t v_t^T, o_t = scale q_t^T (M_t C_{t-1} + D_t k_t v_t^T), in the dtype of state.

    q, k (B, T, H, K), v (B, T, H, V), gates (B, T, H), state (B, H, K, V).
    """
    C, out = state, []
    steps = zip(*(x.to(C.dtype).unbind(1) for x in (q, k, v, source, transition, mark, direct)), strict=True)
    for q_t, k_t, v_t, S, T, M, D in steps:  # (B, H, K) or (B, H, V), and (B, H)
        write = k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # (B, H, K, V)
        S, T, M, D = (gate[..., None, None] for gate in (S, T, M, D))
        out.append(torch.einsum("bhkv,bhk->bhv", M * C + D * write, q_t * scale))
        C = T * C + S * write
    return torch.stack(out, dim=1).to(v.dtype) if out else torch.zeros_like(v), C
