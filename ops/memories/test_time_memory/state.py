"""What a memory carries from token to token: weights at the beginning of the open chunk, and its tokens so far."""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.memories.test_time_memory.rule import MemoryRule


class MemoryState(NamedTuple):
    """The state of n sequences or documents with H heads.

    weights: the accumulators of the memory's matrices at the beginning of the open chunk, (n, H, out, in) each.
    momentum: the running sums of gradients there, in the same shapes; () without momentum.
    chunk: (n, H, C, K + V + gates), keys, values and gates of the open chunk's tokens, zeros in free slots.
    filled: (n,) int64, tokens of the open chunk, below C: a full chunk is learnt behind its last token.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    chunk: Tensor
    filled: Tensor


def zero_state(
    rule: MemoryRule, n: int, H: int, K: int, V: int, *, dtype: torch.dtype, device: torch.device | None = None
) -> MemoryState:
    """The state whose accumulators are zero: what a missing one means."""
    made = [torch.zeros(n, H, *shape, dtype=dtype, device=device) for shape in rule.memory.shapes(K, V)]
    sums = tuple(torch.zeros_like(x) for x in made) if rule.algorithm.momentum else ()
    chunk = torch.zeros(n, H, rule.chunk_size, K + V + len(rule.gates), dtype=dtype, device=device)
    return MemoryState(tuple(made), sums, chunk, torch.zeros(n, dtype=torch.int64, device=device))


def first_state(rule: MemoryRule, start: tuple[Tensor, ...], n: int, K: int, V: int) -> MemoryState:
    """The state of n sequences that begin at learnt accumulators, (H, out, in) each."""
    dtype = torch.promote_types(start[0].dtype, torch.float32)
    zeros = zero_state(rule, n, start[0].shape[0], K, V, dtype=dtype, device=start[0].device)
    return zeros._replace(weights=tuple(x.to(dtype).expand(n, *x.shape) for x in start))
