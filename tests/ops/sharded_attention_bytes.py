"""The bytes that each method of attention receives on every rank, forward and backward, from their table."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sharded_cases import Errors

from zoo.ops import attention, shard

C, B, K, V = 8, 2, 4, 6  # tokens a rank, rows, sizes of keys and values
E, WIDE = 2, 4  # bytes of bfloat16, and of partial results
WINDOW = 5
Expected = tuple[float, float]


def measured(place: shard.SequenceShard, heads: tuple[int, int], **options: Any) -> Expected:
    shapes = (heads[0], K), (heads[1], K), (heads[1], V)
    x = [torch.zeros(B, C, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    seen: list[shard.Message] = []
    with shard.observed(seen.append):
        with shard.use(place):
            o = attention(*x, **options)
        forward = sum(message.received for message in seen)
        o.sum().backward()
    return forward, sum(message.received for message in seen) - forward


def of_keys(rows: float, heads: float) -> float:
    """Elements of keys and values."""
    return rows * B * heads * (K + V)


def ring(ranks: int, rows: float, heads: float) -> Expected:
    keys = (ranks - 1) * of_keys(rows, heads)
    return keys * E, keys * (E + WIDE)


def halo(place: shard.SequenceShard, heads: int) -> Expected:
    """window - 1 keys from the left, their gradients from the right."""
    keys = of_keys(WINDOW - 1, heads)
    before, after = place.rank > 0, place.rank < place.size - 1
    return before * keys * E, before * keys * E + after * keys * WIDE


def ulysses(ranks: int, heads: tuple[int, int]) -> Expected:
    """The same both ways: q, k, v there, o and its log-sum-exp back; do, D there, dq, dk, dv back."""
    each = heads[0] * (K + V) * E + max(heads[1], ranks) * (K + V) * E + heads[0] * WIDE
    return ((ranks - 1) / ranks * C * B * each,) * 2


def usp(place: shard.SequenceShard, inner: int, heads: tuple[int, int]) -> Expected:
    one, two = ulysses(inner, heads), ring(place.size // inner, C * inner, max(heads[1], inner) / inner)
    return one[0] + two[0], one[1] + two[1]


def queries(rows: float, heads: int) -> Expected:
    """Queries that come, forward and backward."""
    return rows * B * heads * K * E, rows * B * heads * ((K + V) * E + 2 * WIDE)


def answers(rows: float, heads: int) -> Expected:
    return rows * B * heads * (V + 1) * WIDE, rows * B * heads * K * WIDE


def tokenring(place: shard.SequenceShard, heads: int, zigzag: bool) -> Expected:
    """Causal and zigzag, half the rows once the queries have passed rank 0, and half the answers from later ranks."""
    steps = range(1, place.size)
    come = sum(0.5 if zigzag and place.rank + step >= place.size else 1.0 for step in steps)
    home = sum(0.5 if zigzag and place.rank < step else 1.0 for step in steps)
    came, back = queries(come * C, heads), answers(home * C, heads)
    return came[0] + back[0], came[1] + back[1]


def lightseq(place: shard.SequenceShard, heads: tuple[int, int]) -> Expected:
    P, r = place.size, place.rank
    times, helping = range(1, P // 2 + 1), range(1, (P - 1) // 2 + 1)
    fetched, read = sum(r >= t for t in times), sum(r + t < P for t in times)
    helped, answered = sum(r < t for t in helping), sum(r + t >= P for t in helping)
    keys = of_keys(C, heads[1])
    come, home = queries(helped * C, heads[0]), answers(answered * C, heads[0])
    return fetched * keys * E + come[0] + home[0], fetched * keys * E + read * keys * WIDE + come[1] + home[1]


def compared(expected: Callable[[shard.SequenceShard], Expected], heads: tuple[int, int], **fields: Any) -> Any:
    options = {key: fields.pop(key) for key in ("causal", "window") if key in fields}

    def check(place: shard.SequenceShard) -> Errors:
        place = replace(place, **{"layout": None, "length": None} | fields)
        if place.attention == "usp":
            place = replace(place, inner=2 if place.size % 2 == 0 else 1)
        got, want = measured(place, heads, **options), expected(place)
        return {"forward": abs(got[0] - want[0]), "backward": abs(got[1] - want[1])}

    return check


def checks() -> dict[str, Any]:
    made: dict[str, Any] = {}
    heads = (4, 2)
    for name in ("allgather", "ring", "zigzag", "striped"):
        made[f"bytes, {name}"] = compared(lambda p: ring(p.size, C, heads[1]), heads, attention=name)
    for name in ("allgather", "ring", "tokenring", "lightseq"):
        made[f"bytes, window, {name}"] = compared(lambda p: halo(p, heads[1]), heads, attention=name, window=WINDOW)
    for shared in (1, 12):  # key heads: one for all ranks, and enough for any
        made[f"bytes, ulysses, {shared}"] = compared(
            lambda p, n=shared: ulysses(p.size, (12, n)), (12, shared), attention="ulysses"
        )
        made[f"bytes, usp, {shared}"] = compared(
            lambda p, n=shared: usp(p, p.inner or 1, (12, n)), (12, shared), attention="usp"
        )
    made["bytes, tokenring"] = compared(
        lambda p: tokenring(p, heads[0], False), heads, attention="tokenring", causal=False
    )
    made["bytes, tokenring, zigzag"] = compared(
        lambda p: tokenring(p, heads[0], True), heads, attention="tokenring", layout="zigzag"
    )
    for n in ((4, 2), (4, 4)):
        made[f"bytes, lightseq, {n}"] = compared(lambda p, n=n: lightseq(p, n), n, attention="lightseq")
    return made
