"""MEGA's gated attention in chunks, and TCNCA's: what tells chunks of each other is an average or a convolution."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.chunked_attention import ChunkedAttention, ChunkState
from zoo.layers.dropout import Dropout
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.moving_average import MovingAverage
from zoo.layers.temporal_convolution import TemporalConvolution
from zoo.ops import causal_conv1d, damped_ema

__all__ = ["TCNCA", "Mega"]


class MegaState(NamedTuple):
    """move: of the moving average, (B, D, N), or of each convolution, (B, rows, D); chunk: keys and values in it."""

    move: Any
    chunk: ChunkState


class GatedChunkedAttention(Mixer):
    """What MEGA and TCNCA share, (B, T, D) -> (B, T, D): u * (h - x), to be added to x.

        x' = norm(x),  m = move(x'),  v = silu(W_v x')
        u, z, r, g = W_m m,  u = sigmoid(u),  z, r = silu(z), silu(r),  q, k = gamma z + beta
        h = silu(g + W_h (r * attend(q, k, v)))

    With x added, the residual is a gate: (1 - u) * x + u * h. So the mixer norms its input itself.

    Args:
        d_model: D.
        move: what carries information along time and between chunks.
        d_key: Z, of queries and keys; even.
        d_value: E, of values; 2 D when omitted.
        chunk_size: C, tokens that see each other.
        weights, bias: of the attention, see `zoo.layers.chunked_attention.ChunkedAttention`.
        dropout: of m, v and h.
        norm_eps: of the LayerNorm.
    """

    def __init__(
        self, d_model: int, move: MovingAverage | TemporalConvolution, *, d_key: int, d_value: int | None,
        chunk_size: int, weights: str, bias: str, dropout: float, norm_eps: float,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.d_key, self.d_value = d_model, d_key, 2 * d_model if d_value is None else d_value
        if self.d_value < 1:
            raise ValueError(f"{type(self).__name__}: d_value must be at least 1; got {self.d_value}")
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.move = move
        self.v_proj = nn.Linear(d_model, self.d_value)
        self.mx_proj = nn.Linear(d_model, 2 * d_model + d_key + self.d_value)
        self.h_proj = nn.Linear(self.d_value, d_model)
        self.gamma = nn.Parameter(torch.empty(2, d_key))
        self.beta = nn.Parameter(torch.empty(2, d_key))
        self.attention = ChunkedAttention(d_key, chunk_size=chunk_size, weights=weights, bias=bias)
        self.dropout = Dropout(dropout)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Queries and keys start as small multiples of z: gamma N(0, 0.02), beta 0."""
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)

    def forward(
        self, x: Tensor, state: MegaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MegaState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        moving, chunk = (None, None) if state is None else state
        normed = self.norm(x)
        v = self.dropout(F.silu(self.v_proj(normed)))
        moved, moving = self.move(normed, moving, cu_seqlens=cu_seqlens)
        D, Z, E = self.d_model, self.d_key, self.d_value
        u, zr, g = self.mx_proj(self.dropout(moved)).split([D, Z + E, D], dim=-1)
        z, r = F.silu(zr).split([Z, E], dim=-1)
        gamma, beta = self.gamma.to(z.dtype), self.beta.to(z.dtype)
        q, k = (torch.addcmul(beta[i], z, gamma[i]) for i in range(2))
        o, chunk = self.attention(q, k, v, chunk, cu_seqlens=cu_seqlens)
        h = self.dropout(F.silu(g + self.h_proj(o * r)))
        return torch.sigmoid(u) * (h - x), MegaState(moving, chunk)

    def init_state(self, batch: int) -> MegaState:
        """The state before the first token: nothing moved, an empty chunk."""
        C, weight = self.attention.chunk_size, self.v_proj.weight
        k, v = weight.new_zeros(batch, C, self.d_key), weight.new_zeros(batch, C, self.d_value)
        filled = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return MegaState(self.move.init_state(batch), ChunkState(k, v, filled))


@register_mixer("mega")
class Mega(GatedChunkedAttention):
    """MEGA's mixer, (B, T, D) -> (B, T, D): attention in chunks behind N damped moving averages of each channel.

    Its output is u * (h - x), which the block adds to x; see `GatedChunkedAttention`. In the pattern of another model x
    is what the block's norm gives.

    Args:
        d_model: D.
        d_state: N, averages of a channel.
        d_key, d_value, chunk_size, weights, bias, dropout, norm_eps: as for `GatedChunkedAttention`.
        backend: of zoo.ops.damped_ema.

    Source: arXiv 2209.10655, section 3; the gates and their order are those of the official code.
    """

    operators = (damped_ema,)

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_key: int = 128, d_value: int | None = None, chunk_size: int = 128,
        weights: str = "softmax", bias: str = "rotary", dropout: float = 0.0, norm_eps: float = 1e-5,
        backend: str = "auto",
    ):  # fmt: skip
        super().__init__(
            d_model, MovingAverage(d_model, d_state=d_state, backend=backend), d_key=d_key, d_value=d_value,
            chunk_size=chunk_size, weights=weights, bias=bias, dropout=dropout, norm_eps=norm_eps,
        )  # fmt: skip


@register_mixer("tcnca")
class TCNCA(GatedChunkedAttention):
    """TCNCA's mixer, (B, T, D) -> (B, T, D): MEGA's, with dilated causal convolutions in the average's place.

    Information enters a chunk from earlier ones through the convolutions alone: queries, keys and gates see R - 1
    tokens back, values none.

    Args:
        d_model: D.
        conv_size: K, taps of a convolution.
        growth: f, level i of the network has taps f^i steps apart.
        n_levels: n.
        per_level: m, convolutions of a level.
        convolution: "depthwise", "separable" or "dense".
        weight_norm: the taps of an output channel are a learnt length times a direction.
        d_key, d_value, chunk_size, weights, bias, dropout, norm_eps: as for `GatedChunkedAttention`.
        backend: of zoo.ops.causal_conv1d.

    Source: arXiv 2312.05605; the network is that of arXiv 1803.01271, its sizes are ours.
    """

    operators = (causal_conv1d,)

    def __init__(
        self, d_model: int, *, conv_size: int = 17, growth: int = 4, n_levels: int = 4, per_level: int = 1,
        convolution: str = "depthwise", weight_norm: bool = False, d_key: int = 128, d_value: int | None = None,
        chunk_size: int = 128, weights: str = "softmax", bias: str = "rotary", dropout: float = 0.0,
        norm_eps: float = 1e-5, backend: str = "auto",
    ):  # fmt: skip
        network = TemporalConvolution(
            d_model, width=conv_size, growth=growth, n_levels=n_levels, per_level=per_level, kind=convolution,
            weight_norm=weight_norm, backend=backend,
        )  # fmt: skip
        super().__init__(
            d_model, network, d_key=d_key, d_value=d_value, chunk_size=chunk_size, weights=weights, bias=bias,
            dropout=dropout, norm_eps=norm_eps,
        )  # fmt: skip
