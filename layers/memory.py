"""What a block keeps for its backward pass: all, its input, or its input and what the mixer's operator made."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from zoo.layers.offload import offload, to_host
from zoo.ops import shard
from zoo.ops.core import recompute

RECOMPUTE = ("none", "block", "mixer_saved")


class Halves(Protocol):
    """A block as this module sees it."""

    @property
    def token_wise(self) -> bool:
        """Does `feed` treat every token alone?"""

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The half over time, with its residual."""

    def feed(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        """The half over channels, with its residual; `tokens`: which of all in one line x is, all when None."""

    def parameters(self) -> Any:
        """As of a module."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the activations of a model's blocks are kept between forward and backward. No plan changes a gradient.

    Args:
        recompute: "none" keeps what autograd saves. "block" keeps a block's input and runs the block again in the
            backward pass. "mixer_saved" also keeps the outputs of the operator over time (and what that saves besides
            its inputs) and runs everything else again: the operator runs once a step, and so do its messages to other
            ranks.
        offload: "none"; "inputs": what a recomputed block keeps of its inputs waits on the host; "alpha:X" with X in
            [0, 1], for mixer_saved: the operator's outputs wait there, too, and the feed-forward half keeps the first X
            of the tokens on the host instead of running them again (arXiv 2407.12117).
        tile_mlp: the feed-forward half in tiles of tokens, each recomputed by itself, so that its inner values exist
            for one tile at a time. A number of tiles, "off", or "auto": as many as make tiles of d_model tokens
            (arXiv 2506.13996). Inside "block" the half then runs three times a step, else twice.

    Memory kept per block of B T tokens, D wide, e bytes a number: "block" B T D e; "mixer_saved" twice that for an
    operator that saves nothing but its inputs, and B T D e more with tiles, which keep the half's input.
    """

    recompute: str = "none"
    offload: str = "none"
    tile_mlp: int | str = "off"

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}; got {self.recompute!r}")
        if self.tile_mlp not in ("off", "auto") and not (isinstance(self.tile_mlp, int) and self.tile_mlp >= 1):
            raise ValueError(f"tile_mlp must be off, auto or a number of tiles; got {self.tile_mlp!r}")
        if self.offload not in ("none", "inputs") and self.alpha is None:
            raise ValueError(f"offload must be none, inputs or alpha:X with X in [0, 1]; got {self.offload!r}")
        if self.offload == "inputs" and self.recompute == "none":
            raise ValueError(
                "offload=inputs sends what recomputation starts from; it needs recompute=block or mixer_saved"
            )
        if self.alpha is not None and self.recompute != "mixer_saved":
            raise ValueError(f"offload={self.offload} needs recompute=mixer_saved; got {self.recompute}")

    @property
    def alpha(self) -> float | None:
        """The fraction of tokens whose feed-forward values wait on the host; None for other ways."""
        name, _, number = self.offload.partition(":")
        try:
            value = float(number)
        except ValueError:
            return None
        return value if name == "alpha" and 0 <= value <= 1 else None

    def tiles(self, tokens: int, width: int) -> int:
        """Into how many tiles a feed-forward half is cut."""
        if self.tile_mlp == "off" or tokens == 0:
            return 1
        wanted = math.ceil(tokens / width) if self.tile_mlp == "auto" else int(self.tile_mlp)
        return min(wanted, tokens)

    def run(self, block: Halves, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """A block: (B, T, D) -> (B, T, D) and its state."""
        if not torch.is_grad_enabled():
            x, state = block.mix(x, state, cu_seqlens)
            return block.feed(x), state

        def mix(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return block.mix(x, state, cu_seqlens)

        def whole(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            x, state = mix(x, state)
            return self._tiled(block, x), state

        if self.recompute == "none":
            return whole(x, state)
        if self.recompute == "block":
            with self._inputs_to_host(x):
                again: tuple[Tensor, Any] = checkpoint(whole, x, state, use_reentrant=False, context_fn=contexts())
            return again
        keeping = recompute.HERE
        if self.alpha is not None:
            engine = offload(x.device)
            keeping = recompute.Keeping(engine.pack, engine.unpack)
        # tiles are checkpoints of their own: around them another one would run them a third time
        apart = self.alpha is not None or (block.token_wise and self.tiles(x.shape[0] * x.shape[1], x.shape[2]) > 1)
        with self._inputs_to_host(x):
            kept = recompute.contexts(keeping)
            mixed: tuple[Tensor, Any] = checkpoint(
                mix if apart else whole, x, state, use_reentrant=False, context_fn=kept
            )
        if not apart:
            return mixed
        x, state = mixed
        if self.alpha is None:
            with self._inputs_to_host(x):
                return self._tiled(block, x), state
        return self._split(block, x, self.alpha), state

    def _inputs_to_host(self, x: Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if self.offload == "none" else to_host(x.device)

    def _tiled(self, block: Halves, x: Tensor) -> Tensor:
        """The feed-forward half, tile by tile where that is asked for."""
        n = self.tiles(x.shape[0] * x.shape[1], x.shape[2]) if block.token_wise else 1
        if n == 1 or not torch.is_grad_enabled():
            return block.feed(x)
        # rows in one line: tiles of several rows would not be contiguous, and recomputation would differ
        return torch.cat(_tiles(block, x.reshape(1, -1, x.shape[2]), n), dim=1).view_as(x)

    def _split(self, block: Halves, x: Tensor, alpha: float) -> Tensor:
        """The feed-forward half: the first tokens kept on the host, the others recomputed."""
        if not block.token_wise:
            with self._inputs_to_host(x):
                fed: Tensor = checkpoint(block.feed, x, use_reentrant=False)
            return fed
        flat = x.reshape(1, -1, x.shape[2])
        tokens = flat.shape[1]
        cut = math.ceil(alpha * tokens)
        parts = []
        if cut:
            with to_host(x.device, block.parameters(), tokens=cut):
                parts.append(block.feed(flat[:, :cut], slice(0, cut)))
        if cut < tokens:
            with self._inputs_to_host(x):
                n = min(self.tiles(tokens, x.shape[2]), tokens - cut)
                parts += _tiles(block, flat[:, cut:], n, cut)
        return torch.cat(parts, dim=1).view_as(x)


def _tiles(block: Halves, x: Tensor, n: int, first: int = 0) -> list[Tensor]:
    """(1, N, D), the tokens from `first` on, in n tiles, each recomputed by itself."""
    size = math.ceil(x.shape[1] / n)
    return [
        checkpoint(block.feed, tile, slice(first + i * size, first + i * size + tile.shape[1]), use_reentrant=False)
        for i, tile in enumerate(x.split(size, dim=1))
    ]


def contexts() -> Any:
    """`context_fn` of torch.utils.checkpoint: recomputation under a sequence shard sends nothing."""
    return noop_context_fn if shard.current() is None else shard.checkpoint_contexts
