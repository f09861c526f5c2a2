"""The meaning of packing, written once: packed documents behave as if each ran alone."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

S = TypeVar("S")


def each_document(
    run: Callable[..., tuple[Tensor, S]],
    cuts: tuple[int, ...] | None,
    inputs: tuple[Tensor | None, ...],
    state: S,
) -> tuple[Tensor, S]:
    """Call `run(*inputs, state)` on every document by itself and join outputs and states.

    Args:
        run: the unpacked form, (*(B, T, ...), (B, ...)) -> ((B, T, ...), (B, ...)).
        cuts: document boundaries, or None for an ordinary batch (one call).
        inputs: tensors with time in dimension 1 (B = 1 when packed); None is passed on.
        state: (B, ...) or, packed, (n, ...): one state per document, a tensor or a tree of tensors. An empty document
            hands its state through.
    """
    if cuts is None:
        return run(*inputs, state)
    outputs, states = [], []
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        own: S = tree_map(lambda x, i=i: x[i : i + 1], state)
        if left < right:
            y, own = run(*(None if x is None else x[:, left:right] for x in inputs), own)
            outputs.append(y)
        states.append(own)
    joined: S = tree_map(lambda *rows: torch.cat(rows), *states)
    return torch.cat(outputs, dim=1), joined


def last_document(cuts: tuple[int, ...] | None, *inputs: Tensor | None) -> list[Any]:
    """The slices of the last document, the one that goes on after this stretch of time; a batch, and None, as it is."""
    if cuts is None:
        return list(inputs)
    return [None if x is None else x[:, cuts[-2] : cuts[-1]] for x in inputs]
