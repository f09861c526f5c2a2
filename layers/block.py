"""The residual block of most models: a mixer over time, cross attention where there is some, a feed-forward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.dropout import Draw, Dropout, DropPath, PathDraw
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Mixer, Surroundings, TokenWise, as_mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.padding import RowsApart
from zoo.layers.state import Prefixes, State, look_ahead, reserve
from zoo.ops import shard

__all__ = ["Block", "BlockState"]


class BlockState(NamedTuple):
    """The state of a block with two mixers: of the mixer over time and of the cross attention."""

    mixer: Any
    cross: Any


class Block(nn.Module):
    """y = s x + drop(mixer(norm(x))); with `cross` the same for it; z = y + drop(feed_forward(norm(y))).

    Args:
        d_model: D.
        mixer: a zoo.layers.Mixer.
        feed_forward: (B, T, D) -> (B, T, D), or None. A zoo.layers.FeedForward that is `token_wise` may be given tiles
            of tokens.
        norm_eps: of the norms.
        residual_scale: s is learnt, one number a channel that starts at 1; else it is 1.
        dropout: share of the numbers that each part adds which is dropped in training, see zoo.layers.Dropout.
        norm: D -> a norm over the last dimension; RMSNorm with `norm_eps` when omitted.
        cross: a second mixer between the two, that looks at `Surroundings.memory`.
        post_norm: norm(x + mixer(x)) in place of x + mixer(norm(x)), for every part.
        drop_path: share of the rows for which a part adds nothing in training (stochastic depth, arXiv 1603.09382).

    `memory` says what is kept for the backward pass; `use_memory` of a model sets it.
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
        norm: Callable[[int], nn.Module] | None = None,
        cross: Mixer | None = None,
        post_norm: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()

        def make_norm() -> nn.Module:
            return RMSNorm(d_model, eps=norm_eps) if norm is None else norm(d_model)

        self.mixer_norm = make_norm()
        self.mixer = as_mixer(mixer)
        self.cross_norm = make_norm() if cross is not None else None
        self.cross = cross
        self.feed_forward_norm = make_norm() if feed_forward is not None else None
        self.feed_forward = feed_forward
        self.residual_scale = nn.Parameter(torch.ones(d_model)) if residual_scale else None
        self.post_norm = post_norm
        self.dropout = Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.memory = MemoryPlan()

    @property
    def token_wise(self) -> bool:
        """The second half may be cut into tiles of tokens."""
        return isinstance(self.feed_forward, TokenWise) and self.feed_forward.token_wise

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Whatever has a state, in order."""
        return (self.mixer,) if self.cross is None else (self.mixer, self.cross)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
        around: Surroundings | None = None,
        rows: RowsApart | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, T, D) -> (B, T, D) and the state.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None.
            cu_seqlens: boundaries of packed documents, where nothing else is around.
            around: what the mixers may see beside x.
            rows: how a padded batch that is cut across ranks runs row by row; for mixers without a state.
        """
        if around is None:
            around = Surroundings(cu_seqlens=cu_seqlens)
        # Drawn before anything is recomputed or cut into tiles, so that these see the same masks.
        draws = self._draw(x) if self.training else _NOTHING
        return self.memory.run(_Call(self, around, rows, draws), x, state, around.cu_seqlens)

    def _draw(self, x: Tensor) -> "_Draws":
        parts = (True, self.feed_forward is not None, self.cross is not None)
        numbers = [self.dropout.draw(x) if part else None for part in parts]
        paths = [self.drop_path.draw(x) if part else None for part in parts]
        mix, feed, cross = zip(numbers, paths, strict=True)
        return _Draws(mix, cross, feed)

    def look_ahead(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, Prefixes]:
        """As `forward` without training, with the way back to the state after any prefix; see zoo.layers.state.

        Raises:
            NotImplementedError: the block has cross attention.
        """
        if self.cross is not None:
            raise NotImplementedError("look_ahead serves blocks of one mixer, and this one has cross attention as well")
        call = _Call(self, Surroundings(cu_seqlens=cu_seqlens), None, _NOTHING)
        mixed, prefixes = look_ahead(
            self.mixer, x if self.post_norm else self.mixer_norm(x), state, cu_seqlens=cu_seqlens
        )
        return call.feed(call.joined(x, mixed, self.mixer_norm)), prefixes

    def feed(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        """z = y + feed_forward(norm(y)), nothing dropped; `tokens` as in _Call.feed."""
        return _Call(self, Surroundings(), None, _NOTHING).feed(x, tokens)

    def init_state(self, batch: int) -> Any:
        """The state before the first token."""
        if self.cross is None:
            return self.mixer.init_state(batch)
        return BlockState(self.mixer.init_state(batch), self.cross.init_state(batch))

    def reserve(self, state: Any, slots: int) -> Any:
        """The state with room for `slots` tokens a row in whatever grows with the text."""
        if self.cross is None:
            return reserve(self.mixer, state, slots)
        return BlockState(reserve(self.mixer, state.mixer, slots), reserve(self.cross, state.cross, slots))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state after `length` tokens."""
        return sum(mixer.state_bytes(batch, length) for mixer in self.mixers)


Drawn = tuple[Draw | None, PathDraw | None]


class _Draws(NamedTuple):
    """What one call of a block drops, part by part: the masks are the call's, however often a part is run."""

    mix: Drawn = (None, None)
    cross: Drawn = (None, None)
    feed: Drawn = (None, None)


_NOTHING = _Draws()


class _Call(NamedTuple):
    """One call of a block, in the halves that a MemoryPlan runs."""

    block: Block
    around: Surroundings
    rows: RowsApart | None
    draws: _Draws

    @property
    def token_wise(self) -> bool:
        return self.block.token_wise

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The half over time, with its residual, and the state."""
        block = self.block
        if block.cross is None or block.cross_norm is None:
            return self._added(x, block.mixer, block.mixer_norm, state, self.draws.mix)
        first, second = (None, None) if state is None else state
        x, first = self._added(x, block.mixer, block.mixer_norm, first, self.draws.mix)
        x, second = self._added(x, block.cross, block.cross_norm, second, self.draws.cross)
        return x, BlockState(first, second)

    def _added(self, x: Tensor, mixer: Mixer, norm: nn.Module, state: Any, drawn: Drawn) -> tuple[Tensor, Any]:
        """s x + mixer(norm(x)), or norm(s x + mixer(x))."""
        mixed, state = self._mixed(mixer, x if self.block.post_norm else norm(x), state)
        return self.joined(x, _dropped(mixed, drawn), norm), state

    def joined(self, x: Tensor, mixed: Tensor, norm: nn.Module) -> Tensor:
        """What goes on behind a part that adds `mixed`: s x + mixed, or its norm where the block norms afterwards."""
        scale = self.block.residual_scale
        added: Tensor = x + mixed if scale is None else torch.addcmul(mixed, x, scale.to(x.dtype))
        return norm(added) if self.block.post_norm else added

    def _mixed(self, mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.rows is None:
            return mixer(x, state, **self.around.given(mixer))
        apart = []
        for row, (place, cuts) in zip(x.split(1), self.rows, strict=True):
            with shard.use_view(place):
                apart.append(mixer(row, **self.around._replace(cu_seqlens=cuts).given(mixer))[0])
        return torch.cat(apart), None

    def feed(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        """The half over channels; `tokens`: which of all in one line x (1, n, D) is, all when None."""
        block = self.block
        if block.feed_forward is None or block.feed_forward_norm is None:
            return x
        fed: Tensor = block.feed_forward(x if block.post_norm else block.feed_forward_norm(x))
        added = x + _dropped(fed, self.draws.feed, tokens)
        return block.feed_forward_norm(added) if block.post_norm else added

    def parameters(self) -> Any:
        return self.block.parameters()


def _dropped(x: Tensor, drawn: Drawn, tokens: slice | None = None) -> Tensor:
    numbers, paths = drawn
    if numbers is not None:
        x = numbers.apply(x, tokens)
    return x if paths is None else paths.apply(x, tokens)
