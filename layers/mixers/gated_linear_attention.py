"""Gated Linear Attention: a matrix memory whose rows decay at rates that the data choose."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import ShortConvolution, initial_tails, side_by_side
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import GatedRMSNorm
from zoo.ops import gated_linear_attention

__all__ = ["GatedLinearAttention"]


class GatedLinearAttentionState(NamedTuple):
    """memory: (B, H, K, V) float32; convs: the tails of the convolutions of q, k, v, empty without them."""

    memory: Tensor
    convs: tuple[Tensor, ...]


@register_mixer("gla")
class GatedLinearAttention(Mixer):
    """GLA's mixer, (B, T, D) -> (B, T, D): S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K).

    a_t = sigmoid(x W1 W2 + b)**(1 / temperature) per key channel; the output is normalised per head and gated by silu.

    Args:
        d_model: D.
        n_heads: H. The paper and its code use few, wide heads: 4.
        n_kv_heads: heads of k, v and the decay, shared by groups of query heads; n_heads when omitted.
        expand_k, expand_v: H * K and H * V as multiples of D.
        gate_rank: rank of the decay's projection.
        temperature: the decay's logits are divided by this after the log-sigmoid; 16 makes forgetting slow.
        gate_floor: lowest log decay per step, or None for no bound.
        conv_size: width of short convolutions with SiLU on q, k, v, or None (the paper's choice).
        norm_eps: of the output norm.
        backend: of zoo.ops.gated_linear_attention.

    Source: arXiv 2312.06635, section 4.4.
    """

    operators = (gated_linear_attention,)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        temperature: float = 16.0,
        gate_floor: float | None = None,
        conv_size: int | None = None,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or self.n_kv_heads < 1 or n_heads % self.n_kv_heads:
            raise ValueError(f"GatedLinearAttention: n_kv_heads must divide n_heads = {n_heads}; got {self.n_kv_heads}")
        key_dim, value_dim = int(d_model * expand_k), int(d_model * expand_v)
        if key_dim % n_heads or value_dim % n_heads:
            raise ValueError(
                f"GatedLinearAttention: n_heads must divide expand_k * d_model and expand_v * d_model; "
                f"got {n_heads} heads for {key_dim} and {value_dim}"
            )
        self.head_k, self.head_v = key_dim // n_heads, value_dim // n_heads
        if min(self.head_k, self.head_v) < 1:
            raise ValueError(
                f"GatedLinearAttention: the keys and values of a head must be at least 1; got {self.head_k} and "
                f"{self.head_v} for {n_heads} heads"
            )
        self.temperature, self.gate_floor, self.backend = temperature, gate_floor, backend
        kv_k, kv_v = self.head_k * self.n_kv_heads, self.head_v * self.n_kv_heads
        self.q_proj = nn.Linear(d_model, key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, kv_k, bias=False)
        self.v_proj = nn.Linear(d_model, kv_v, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, kv_k))
        self.g_proj = nn.Linear(d_model, value_dim, bias=False)
        self.convs = nn.ModuleList(
            ShortConvolution(size, conv_size, backend=backend)
            for size in (key_dim, kv_k, kv_v)
            if conv_size is not None
        )
        self.o_norm = GatedRMSNorm(self.head_v, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GatedLinearAttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, GatedLinearAttentionState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        B, T, _ = x.shape
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        memory, tails = (None, ()) if state is None else state
        streams, tails = side_by_side(self.convs, streams, tails, cu_seqlens=cu_seqlens)
        q = streams[0].view(B, T, self.n_heads, self.head_k)
        k = streams[1].view(B, T, self.n_kv_heads, self.head_k)
        v = streams[2].view(B, T, self.n_kv_heads, self.head_v)
        logits = self.gk_proj(x)
        g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.temperature
        if self.gate_floor is not None:
            g = g.clamp_min(self.gate_floor)
        g = g.view(B, T, self.n_kv_heads, self.head_k)
        if self.n_kv_heads != self.n_heads:
            k, v, g = (z.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for z in (k, v, g))
        o, memory = gated_linear_attention(q, k, v, g, memory, cu_seqlens=cu_seqlens, backend=self.backend)
        o = self.o_norm(o, self.g_proj(x).view(B, T, self.n_heads, self.head_v))
        return self.o_proj(o.flatten(2)), GatedLinearAttentionState(memory, tails)

    def init_state(self, batch: int) -> GatedLinearAttentionState:
        """The state before the first token: zeros for memory and convolutions."""
        weight = self.o_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        memory = torch.zeros(batch, self.n_heads, self.head_k, self.head_v, dtype=dtype, device=weight.device)
        return GatedLinearAttentionState(memory, initial_tails(self.convs, batch))
