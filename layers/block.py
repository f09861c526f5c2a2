"""The residual block of most models: a mixer over time, then a feed-forward over channels."""

from typing import Any

from torch import Tensor, nn

from zoo.layers.norms import RMSNorm


class Block(nn.Module):
    """y = x + mixer(norm(x)); z = y + feed_forward(norm(y)). Without a feed-forward only the first half.

    Args:
        d_model: D.
        mixer: (x, state, cu_seqlens=) -> (y, state).
        feed_forward: (B, T, D) -> (B, T, D), or None.
        norm_eps: of both norms.
    """

    def __init__(self, d_model: int, mixer: nn.Module, feed_forward: nn.Module | None, *, norm_eps: float = 1e-6):
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer: Any = mixer  # a module with init_state and state_bytes
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps) if feed_forward is not None else None
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        x = x + mixed
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, state
