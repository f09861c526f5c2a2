"""Dropout whose mask stays the same when time is cut across ranks or a layer is recomputed."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.ops import dropout
from zoo.ops.token_wise.dropout import addresses, check_rate


class Draw(NamedTuple):
    """One mask over (B, T, D) before it is made: applied twice, or to a part, it drops the same numbers.

    at: row and position of every token, (2, B, T).
    """

    p: float
    seed: int
    stream: int
    at: Tensor

    def apply(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        """x with its numbers dropped; `tokens`: which of the B T tokens in one line x (1, n, D) is, all when None."""
        at = self.at if tokens is None else self.at.reshape(2, 1, -1)[:, :, tokens]
        return dropout(x, self.p, self.seed, stream=self.stream, at=at)


class PathDraw(NamedTuple):
    """Which rows a part of a block adds to, before it is applied: 0 or 1 / (1 - p), (B, 1, 1), for T tokens each."""

    kept: Tensor
    length: int

    def apply(self, x: Tensor, tokens: slice | None = None) -> Tensor:
        """x with whole rows dropped; `tokens`: which of the B T tokens in one line x (1, n, D) is, all when None."""
        if tokens is None:
            return x * self.kept
        return x * self.kept.expand(-1, self.length, 1).reshape(1, -1, 1)[:, tokens]


class Dropout(nn.Module):
    """zoo.ops.dropout under a seed from torch's generator on the CPU, drawn anew at every call in training.

    So `torch.manual_seed` decides, recomputation restores the generator and with it the mask, and ranks that share
    sequences drop what one process drops as long as their generators agree. `stream` tells ranks with other data apart.

    Args:
        p: the share of the numbers that is dropped, in [0, 1); the others are scaled by 1 / (1 - p).

    Raises:
        ValueError: p out of range.
    """

    operators = (dropout,)

    def __init__(self, p: float = 0.0):
        super().__init__()
        check_rate(p)
        self.p, self.stream = p, 0

    def draw(self, x: Tensor) -> Draw | None:
        """A mask for x (B, T, D), or None where nothing is dropped."""
        if not self.training or self.p == 0:
            return None
        return Draw(self.p, draw_seed(), self.stream, addresses(x.shape[0], x.shape[1], x.device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); or (B, D) -> (B, D), without time and dropped alike on ranks that share it."""
        if not self.training or self.p == 0:
            return x
        if x.ndim == 2:
            at = torch.stack([torch.arange(len(x), device=x.device), x.new_zeros(len(x), dtype=torch.long)])
            return dropout(x.unsqueeze(1), self.p, draw_seed(), stream=self.stream, at=at.unsqueeze(-1)).squeeze(1)
        draw = self.draw(x)
        assert draw is not None
        return draw.apply(x)

    def extra_repr(self) -> str:
        """The share that is dropped, for print(model)."""
        return f"p={self.p}"


class DropPath(Dropout):
    """Drop whole rows of a batch: stochastic depth, drawn as Dropout draws."""

    def draw(self, x: Tensor) -> PathDraw | None:  # type: ignore[override]
        """Rows of x (B, T, D), or None where nothing is dropped."""
        if not self.training or self.p == 0:
            return None
        at = torch.stack([torch.arange(len(x), device=x.device), x.new_zeros(len(x), dtype=torch.long)]).unsqueeze(-1)
        kept = dropout(x.new_ones(len(x), 1, 1), self.p, draw_seed(), stream=self.stream, at=at)
        return PathDraw(kept, x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        draw = self.draw(x)
        return x if draw is None else draw.apply(x)


def draw_seed() -> int:
    """63 bits from torch's generator on the CPU: no device is waited for."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def set_streams(model: nn.Module, stream: int) -> None:
    """Let every layer of a model that drops numbers draw from another stream: the rank of the data in training."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.stream = stream
