"""What every way for attention to cross ranks has: a shard, a seat, and who sees whom."""

from collections.abc import Sequence

from torch import Tensor

from zoo.ops.attention.attention.parallel import local
from zoo.ops.attention.attention.parallel.view import Block, View
from zoo.ops.core.dispatch import state_dtype
from zoo.ops.shard.sequence_shard import SequenceShard


class Crossing:
    """One way: `forward` gives o and lse of this rank's queries, `backward` the gradients of its q, k and v.

    Args:
        view: who sees whom.
        ranks: the rank at each seat that this one exchanges with; all when omitted.
        seat: its own.
    """

    kept: tuple[Tensor, ...] = ()  # what `forward` leaves for `backward` in place of q, k and v

    def __init__(
        self, shard: SequenceShard, view: View, scale: float, ranks: tuple[int, ...] | None = None, seat: int = -1
    ):
        self.shard, self.view, self.scale = shard, view, scale
        self.ranks = tuple(range(shard.size)) if ranks is None else ranks
        self.seat = shard.rank if ranks is None else seat

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and lse (B, T, H) in the dtype of sums."""
        raise NotImplementedError

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, of this rank's own tokens.

        inputs: q, k and v, or what `forward` has kept in their place.
        D: sum of do * o - dlse, (B, T, H). m: the log-sum-exp, +inf where a query sees nothing.
        """
        raise NotImplementedError

    def like(self, x: Tensor, seat: int) -> Tensor:
        """An empty tensor as x is at another seat, without memory."""
        return x.new_empty(1).expand(x.shape[0], self.view.tokens(seat), *x.shape[2:])


def sums_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros in the dtype of sums."""
    return tuple(x.new_zeros(x.shape, dtype=state_dtype(x)) for x in tensors)


def rows(block: Block, *tensors: Tensor, start: int = 0) -> list[Tensor]:
    """The block's rows of tensors that begin at row `start`."""
    return [x[:, block.rows[0] - start : block.rows[1] - start] for x in tensors]


def columns(block: Block, *tensors: Tensor) -> list[Tensor]:
    """The block's keys of each tensor (B, S, Hk, X)."""
    return [x[:, slice(*block.columns)] for x in tensors]


def add_part(total: local.Sum, block: Block | None, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Attend to one block of the keys; nothing for a block that nobody sees."""
    if block is not None:
        (q,), (k, v) = rows(block, q), columns(block, k, v)
        o, lse = local.forward(q, k, v, block=block, scale=scale)
        total.add(block.rows, o, lse)


def add_gradients(
    into: tuple[Tensor, Tensor, Tensor],
    block: Block | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    D: Tensor,
    m: Tensor,
    scale: float,
) -> None:
    """The same for gradients, added into (dq, dk, dv)."""
    if block is not None:
        (q, do, D, m), (k, v) = rows(block, q, do, D, m), columns(block, k, v)
        parts = local.backward(q, k, v, do, D, m, block=block, scale=scale)
        for x, part in zip((*rows(block, into[0]), *columns(block, *into[1:])), parts, strict=True):
            x.add_(part)
