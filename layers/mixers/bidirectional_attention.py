"""Softmax attention over both sides of every token: the mixer of encoders and of vision transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.rotary import rotary_tables
from zoo.layers.state import refuse_state
from zoo.ops import attention, rotary, shard

__all__ = ["BidirectionalAttention"]


@register_mixer("bidirectional_attention")
class BidirectionalAttention(Mixer):
    """Multi-head softmax attention without a causal mask, (B, T, D) -> (B, T, D).

    Args:
        d_model: D.
        n_heads: heads; d_model // 64, at least one, when omitted.
        window: see only tokens nearer than this on either side; None sees all.
        rope_base: base of the rotary frequencies; None for no positions.
        bias: of all four projections.
        qk_norm: RMSNorm over each head of q and k.
        norm_eps: of that norm.
        backend: of zoo.ops.attention.

    Source: arXiv 1706.03762, section 3.2.
    """

    causal = False
    operators = (attention, rotary)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        window: int | None = None,
        rope_base: float | None = 10000.0,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads = max(1, d_model // 64) if n_heads is None else n_heads
        if self.n_heads < 1 or d_model % self.n_heads:
            raise ValueError(
                f"BidirectionalAttention: n_heads must divide d_model = {d_model}; got {self.n_heads} heads"
            )
        self.head_dim = d_model // self.n_heads
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(
                f"BidirectionalAttention: rotary positions need an even d_model / n_heads; got {self.head_dim}"
            )
        if window is not None and window < 1:
            raise ValueError(
                f"BidirectionalAttention: window must be at least 1 (it counts the own position); got {window}"
            )
        self.window, self.rope_base, self.backend = window, rope_base, backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=bias) for _ in range(4))
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """(y, None): there is no state to hand on, and none is taken."""
        refuse_state("BidirectionalAttention", state)
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            cos, sin = rotary_tables(_positions(x, cu_seqlens), self.head_dim, self.rope_base)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        o = attention(q, k, v, causal=False, window=self.window, cu_seqlens=cu_seqlens, backend=self.backend)
        return self.o_proj(o.flatten(2)), None

    def extra_repr(self) -> str:
        """Heads and rotary base, for print(model)."""
        return f"n_heads={self.n_heads}, head_dim={self.head_dim}, window={self.window}, rope_base={self.rope_base}"


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(1, T): every token's place in its own document, and in the whole sequence where time is cut across ranks."""
    place, T = shard.current(), x.shape[1]
    if place is not None and (place.documents is not None or cu_seqlens is None):
        return shard.positions(place, T, x.device)[None]
    steps = torch.arange(T, device=x.device)
    if cu_seqlens is None:
        return steps[None]
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=T)
    return (steps - starts)[None]
