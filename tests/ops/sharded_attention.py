"""Softmax attention cut across ranks, by every method: one process's numbers, the bytes promised, nothing sent twice."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from sharded_cases import Errors, like, summed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.ops import attention, shard
from zoo.ops.attention.parallel import local
from zoo.ops.proof import relative_error

Check = Callable[[shard.SequenceShard], Errors]
EVEN, UNEVEN = 24, 29  # a multiple of 2 P for every P, and of none
DOCUMENTS = {EVEN: (0, 5, 11, 11, 22, 24), UNEVEN: (0, 3, 20, 21, 29)}
WINDOW = 5
WAYS: dict[str, dict[str, Any]] = {
    "allgather": {"attention": "allgather"},
    "allgather, zigzag": {"attention": "allgather", "layout": "zigzag"},
    "allgather, striped": {"attention": "allgather", "layout": "striped"},
    "ring": {"attention": "ring"},
    "zigzag": {"attention": "zigzag"},
    "striped": {"attention": "striped"},
    "ulysses": {"attention": "ulysses"},
    "ulysses, zigzag": {"attention": "ulysses", "layout": "zigzag"},
    "usp": {"attention": "usp"},
    "usp, zigzag": {"attention": "usp", "layout": "zigzag"},
    "tokenring": {"attention": "tokenring"},
    "tokenring, zigzag": {"attention": "tokenring", "layout": "zigzag"},
    "lightseq": {"attention": "lightseq"},
}
HEADS = ((4, 2), (4, 4), (4, 1), (6, 3))


def placed(place: shard.SequenceShard, way: str, length: int, *, packed: bool = False) -> shard.SequenceShard:
    fields = {"layout": None, **WAYS[way], "length": length, "documents": DOCUMENTS[length] if packed else None}
    if way.startswith("usp"):
        fields["inner"] = 2 if place.size % 2 == 0 else 1
    return replace(place, **fields)


def own(place: shard.SequenceShard, length: int) -> Tensor:
    return shard.held(length, place.rank, place.size, place.layout or "contiguous")


def qkv(length: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads[0], 4), (batch, length, heads[1], 4), (batch, length, heads[1], 6))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def equals_one(
    place: shard.SequenceShard, *, length: int, heads: tuple[int, int] = (4, 2), causal: bool = True,
    window: int | None = None, packed: bool = False, cross: bool = True,
) -> Errors:  # fmt: skip
    """Outputs, log-sum-exps and gradients against the definition on the whole sequence."""
    x = qkv(length, heads, batch=1 if packed else 2)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": 0.7, "return_lse": True}
    cu = torch.tensor(DOCUMENTS[length]) if packed else None
    o, lse = attention(*x, **options, cu_seqlens=cu, backend="reference")
    do, dlse = like(o, 1), like(lse, 2)
    whole = torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), x)

    tokens = own(place, length)
    with shard.use(place) if cross else nullcontext():
        o_, lse_ = attention(*(y[:, tokens] for y in x), **options)
    loss = (o_ * do[:, tokens]).sum() + (lse_ * dlse[:, tokens]).sum()
    errors = {"output": relative_error(o_, o[:, tokens]), "lse": relative_error(lse_, lse[:, tokens])}
    parts = torch.autograd.grad(loss, x)
    for name, ours, exact in zip("qkv", summed(place, parts), whole, strict=True):
        errors[f"d {name}"] = relative_error(ours, exact)
    return errors


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {}
    for way, packed, window, causal in itertools.product(WAYS, (False, True), (None, WINDOW), (True, False)):
        if way == "lightseq" and not causal:
            continue
        plain = causal and window is None
        contiguous = not any(layout in way for layout in ("zigzag", "striped"))
        for heads in HEADS if plain else HEADS[:1]:
            for length in (EVEN, UNEVEN, 3) if contiguous else (EVEN,):
                if length == 3 and (packed or heads != HEADS[0]):
                    continue
                name = f"{way}, {heads}, {length}{', documents' * packed}, window {window}, causal {causal}"
                made[name] = (
                    lambda place, w=way, p=packed, n=length, options=dict(length=length, heads=heads, packed=packed, window=window, causal=causal): (
                        equals_one(placed(place, w, n, packed=p), **options)
                    )
                )
    return made
