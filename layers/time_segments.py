"""Long sequences on a CPU, a stretch of time after another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops import shard

# Numbers in an array of a stretch. The C library hands arrays above 32 MiB (2**23 numbers of float32) back to the
# system and takes them anew, page by page; smaller ones are used again and may still be in the cache. CPU time of the
# forward pass of a block of width 768 (2 E = 3072), T = 1024, one thread: 348, 311, 285, 248 ms in stretches of 2**18
# ... 2**21 numbers, 235 ms in one.
NUMBERS = 2**22
MULTIPLE = 64  # steps: chunks of the scans stay whole


def in_segments(
    mix: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any, *, width: int
) -> tuple[Tensor, Any]:
    """Run `mix(x, state) -> (y, state)` over stretches of time, where that saves memory traffic; else in one call.

    Cutting time anywhere changes nothing for such a function. Each stretch adds its part to the gradients of the
    weights: their number is kept small.

    Args:
        mix: from x (B, T, D) to y (B, T, ...).
        x: (B, T, D).
        state: what an earlier call returned, or None.
        width: of the widest arrays inside, (B, T, width).
    """
    length = x.shape[1]
    size = max(1, NUMBERS // (MULTIPLE * max(1, x.shape[0]) * width)) * MULTIPLE
    # One rank's slice of time is one call: its operators exchange states.
    if length <= size or x.device.type != "cpu" or shard.current() is not None or torch.compiler.is_compiling():
        return mix(x, state)
    parts = []
    for part in x.split(size, dim=1):
        y, state = mix(part, state)
        parts.append(y)
    return torch.cat(parts, dim=1), state
