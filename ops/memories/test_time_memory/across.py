"""A memory whose time is cut across ranks: its state goes from rank to rank, head by head.

A state is several tensors; what travels is one, with a row for every head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.memories.test_time_memory.memory import Norm
from zoo.ops.memories.test_time_memory.reference import Tokens
from zoo.ops.memories.test_time_memory.state import MemoryState

Form = Callable[[Tokens, Norm, MemoryState], tuple[Tensor, MemoryState]]


def packed(state: MemoryState) -> Tensor:
    """(n, H, numbers): all of a state; the count as a number, which is exact below 2^24."""
    n, H = state.chunk.shape[:2]
    count = state.filled.to(state.chunk.dtype).view(n, 1, 1).expand(n, H, 1)
    return torch.cat([*(x.flatten(2) for x in (*state.weights, *state.momentum, state.chunk)), count], dim=2)


def unpacked(flat: Tensor, like: MemoryState) -> MemoryState:
    """The inverse of `packed`, with the sizes of another state, for any rows and heads."""
    tensors = (*like.weights, *like.momentum, like.chunk)
    parts = flat.split([*(x[0, 0].numel() for x in tensors), 1], dim=2)
    made = [x.reshape(*flat.shape[:2], *y.shape[2:]) for x, y in zip(parts, tensors, strict=False)]
    n = len(like.weights)
    filled = parts[-1][:, 0, 0].detach().round().long()
    return MemoryState(tuple(made[:n]), tuple(made[n:-1]), made[-1], filled)


def from_rank_to_rank(
    form: Form, tokens: Tokens, norm: Norm, state: MemoryState, cuts: tuple[int, ...] | None
) -> tuple[Tensor, MemoryState]:
    """Heads are the micro-batches. The state of the first document comes, and that of the last one goes.

    The states of the other documents travel inside with the output, in one tensor, since a row has one output.
    """
    q, k, v, gates = tokens
    B, T, H = k.shape[:3]
    V, n = v.shape[-1], len(gates)
    by_head = packed(state).transpose(0, 1)  # (H, documents, numbers)
    first = by_head.shape[1] if cuts is None else 1
    slow = [x for x in norm if x is not None]

    def rows(*given: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, others, before = given
        q, k, v, *gates = (x.movedim(0, 2) for x in inputs[: 3 + n])
        learnt = iter(inputs[3 + n :])
        here = Norm(*(None if x is None else next(learnt) for x in norm))
        y, after = form(
            Tokens(q, k, v, tuple(gates)), here, unpacked(torch.cat([before, others], dim=1).transpose(0, 1), state)
        )
        flat = packed(after).transpose(0, 1)
        both = torch.cat([y.movedim(2, 0).flatten(1), flat.flatten(1)], dim=1)
        return both, flat if cuts is None else flat[:, -1:]

    inputs = (*(x.movedim(2, 0) for x in (q, k, v, *gates)), *slow, by_head[:, first:])
    both, _ = shard.serial(rows, inputs, by_head[:, :first])
    y, flat = both.split([B * T * V, both.shape[1] - B * T * V], dim=1)
    return y.reshape(H, B, T, V).movedim(0, 2), unpacked(flat.reshape(by_head.shape).transpose(0, 1), state)
