"""The residual block of most models: a mixer over time, then a feed-forward over channels."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers.memory import MemoryPlan
from zoo.layers.norms import RMSNorm


class Block(nn.Module):
    """y = s x + mixer(norm(x)); z = y + feed_forward(norm(y)). Without a feed-forward only the first half.

    Args:
        d_model: D.
        mixer: (x, state, cu_seqlens=) -> (y, state).
        feed_forward: (B, T, D) -> (B, T, D), or None. One with an attribute `token_wise` that is true treats every
            token alone, and may be given tiles of tokens.
        norm_eps: of both norms.
        residual_scale: s is learnt, one number a channel that starts at 1; else it is 1.

    `memory` says what is kept for the backward pass; SequenceModel.use_memory sets it.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        feed_forward: nn.Module | None,
        *,
        norm_eps: float = 1e-6,
        residual_scale: bool = False,
    ):
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer: Any = mixer  # a module with init_state and state_bytes
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps) if feed_forward is not None else None
        self.feed_forward = feed_forward
        self.residual_scale = nn.Parameter(torch.ones(d_model)) if residual_scale else None
        self.memory = MemoryPlan()

    @property
    def token_wise(self) -> bool:
        """The second half may be cut into tiles of tokens."""
        return bool(getattr(self.feed_forward, "token_wise", False))

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.memory.run(self, x, state, cu_seqlens)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """y = s x + mixer(norm(x)), and the mixer's state."""
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        if self.residual_scale is None:
            return x + mixed, state
        return torch.addcmul(mixed, x, self.residual_scale.to(x.dtype)), state

    def feed(self, x: Tensor) -> Tensor:
        """z = y + feed_forward(norm(y))."""
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        fed: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + fed
