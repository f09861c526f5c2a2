"""The residual block of most models: a mixer over time, then a feed-forward over channels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.dropout import Draw, Dropout
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import TokenWise, as_mixer
from zoo.layers.norms import RMSNorm


class Block(nn.Module):
    """y = s x + drop(mixer(norm(x))); z = y + drop(feed_forward(norm(y))). Without a feed-forward only the first half.

    Args:
        d_model: D.
        mixer: a zoo.layers.Mixer.
        feed_forward: (B, T, D) -> (B, T, D), or None. A zoo.layers.FeedForward that is `token_wise` may be given tiles
            of tokens.
        norm_eps: of both norms.
        residual_scale: s is learnt, one number a channel that starts at 1; else it is 1.
        dropout: share of the numbers that each half adds which is dropped in training, see zoo.layers.Dropout.

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
        dropout: float = 0.0,
    ):
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = as_mixer(mixer)
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps) if feed_forward is not None else None
        self.feed_forward = feed_forward
        self.residual_scale = nn.Parameter(torch.ones(d_model)) if residual_scale else None
        self.dropout = Dropout(dropout)
        self.memory = MemoryPlan()

    @property
    def token_wise(self) -> bool:
        """The second half may be cut into tiles of tokens."""
        return isinstance(self.feed_forward, TokenWise) and self.feed_forward.token_wise

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        # Drawn before anything is recomputed or cut into tiles, so that these see the same masks.
        first = second = None
        if self.training:
            first, second = self.dropout.draw(x), self.dropout.draw(x) if self.feed_forward is not None else None
        halves = self if first is None else _Dropping(self, first, second)
        return self.memory.run(halves, x, state, cu_seqlens)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None, draw: Draw | None = None) -> tuple[Tensor, Any]:
        """y = s x + mixer(norm(x)), and the mixer's state."""
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        if draw is not None:
            mixed = draw.apply(mixed)
        if self.residual_scale is None:
            return x + mixed, state
        return torch.addcmul(mixed, x, self.residual_scale.to(x.dtype)), state

    def feed(self, x: Tensor, tokens: slice | None = None, draw: Draw | None = None) -> Tensor:
        """z = y + feed_forward(norm(y)); `tokens`: which of all in one line x (1, n, D) is, all when None."""
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        fed: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + (fed if draw is None else draw.apply(fed, tokens))


class _Dropping(NamedTuple):
    """A block's halves in one call under dropout: the masks are the call's, however often a half is run."""

    block: Block
    first: Draw
    second: Draw | None

    @property
    def token_wise(self) -> bool:
        return self.block.token_wise

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return self.block.mix(x, state, cu_seqlens, self.first)

    def feed(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        return self.block.feed(x, tokens, self.second)

    def parameters(self) -> Any:
        return self.block.parameters()
