"""Rows of text that grow by blocks: keys and values of finished blocks, and a block in work behind them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.layers import SequenceModel
from zoo.layers.kv_cache import AttentionState
from zoo.layers.mixer import Surroundings
from zoo.ops import Visible

__all__ = ["BlockCache"]

ALL = 2**31 - 1  # behind the label of every block


class BlockCache:
    """Attention by blocks: a token sees its own block and all blocks before it.

    The cache holds finished blocks alone. `look` leaves it as it is, and `write` appends to it.

    Args:
        model: all its layers are attention over the whole past.
        rows: of text.
        block_size: tokens of a block.
    """

    def __init__(self, model: SequenceModel, rows: int, block_size: int):
        self.model, self.block_size = model, block_size
        self.device = next(model.parameters()).device
        self.length = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._state: Any = None
        self._open: Any = None

    @torch.inference_mode()
    def look(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Run tokens behind the cache, none in some rows; hidden vectors (B, longest, D).

        A window begins with a block, and may hold several. What stands behind a row's own tokens means nothing.
        """
        most = max(map(len, windows))
        tokens = torch.tensor([[*row, *[0] * (most - len(row))] for row in windows], device=self.device)
        sizes = torch.tensor([len(row) for row in windows], device=self.device)
        slots = most + (0 if self._state is None else self._state[0].k.shape[1])
        key = torch.arange(slots, device=self.device).expand(len(tokens), -1)
        positions = self.length[:, None] + torch.arange(most, device=self.device)
        first = key // self.block_size
        end = torch.where(key < (self.length + sizes)[:, None], ALL, first)
        around = Surroundings(positions=positions, visible=Visible(positions // self.block_size, first, end))
        x = self.model.embedding(tokens)
        hidden: Tensor
        hidden, self._open = self.model.blocks(x, self._state, around=around, final=self.model.norm)
        return hidden

    @torch.inference_mode()
    def logits(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """As `look`, with the head: (B, longest, vocab)."""
        return self.model.head(self.look(windows))

    def write(self, sizes: Sequence[int]) -> None:
        """Keep the first sizes[b] tokens, whole blocks, of what `look` ran last; the others leave no trace."""
        if any(sizes):
            self.length = self.length + torch.tensor(list(sizes), device=self.device)
            self._state = tuple(AttentionState(layer.k, layer.v, self.length) for layer in self._open)
        self._open = None
