"""Learnt absolute positions, for models whose mixers do not find their own."""

import itertools

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.layers.block import Block
from zoo.layers.dropout import Dropout
from zoo.layers.mixer import Mixer
from zoo.ops import shard
from zoo.ops.core import check

__all__ = ["LearnedPositions", "position_block"]


class LearnedPositions(Mixer):
    """The learnt vector of every token's place in its own sequence, (B, T, D) -> (B, T, D), whatever x is.

    The state is how many tokens came before, (B,) int64. So it serves padded and packed rows, decoding, and time that
    is cut across ranks.

    Args:
        d_model: D.
        max_length: places that have a vector. Longer sequences are refused.
    """

    def __init__(self, d_model: int, max_length: int):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the tokens before it -> the vectors of its places, and the tokens up to its end.

        Raises:
            UserError: a sequence is longer than max_length.
        """
        B, T, _ = x.shape
        if cu_seqlens is None:
            cuts, lengths = None, torch.full((B,), T, dtype=torch.long, device=x.device)
        else:
            cuts = check.boundaries("LearnedPositions", cu_seqlens, B, T)
            lengths = cu_seqlens.diff().long()
        before = torch.zeros_like(lengths) if state is None else state
        if shard.current() is not None:
            several = len(lengths) > B
            before = shard.incoming_fold(torch.add, lengths[-1:] if several else lengths, before, several)
        after = before + lengths
        self._refuse_beyond(T if cuts is None else max(b - a for a, b in itertools.pairwise(cuts)), after)
        steps = torch.arange(T, device=x.device)
        if cu_seqlens is None:
            places = before[:, None] + steps
        else:
            document = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=T)
            places = (before[document] + steps - cu_seqlens[document])[None]
        y: Tensor = self.table(places)
        return y.to(x.dtype), after

    def _refuse_beyond(self, longest: int, after: Tensor) -> None:
        """The lengths of the call are known; those before it lie on the device, and are not asked for in a program."""
        if after.numel() and not after.is_meta and not torch.compiler.is_compiling():
            longest = max(longest, int(after.max()))
        if longest > self.table.num_embeddings:
            raise UserError(
                f"the model has learnt positions for at most {self.table.num_embeddings} tokens a sequence; got "
                f"{longest}, shorten the text or train with a larger model.max_length"
            )

    def init_state(self, batch: int) -> Tensor:
        """No tokens yet: zeros (batch,) int64."""
        return torch.zeros(batch, dtype=torch.long, device=self.table.weight.device)


def position_block(d_model: int, positions: LearnedPositions, dropout: float) -> Block:
    """A block in front of all others: dropout(x + position)."""

    def after(width: int) -> nn.Module:
        return Dropout(dropout)

    return Block(d_model, positions, None, norm=after, post_norm=True)
