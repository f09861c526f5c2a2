"""Attention across ranks without ranks: who sees whom, who works when, how parts merge; the rest is in sharded.py."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from zoo.ops.attention.attention import attention
from zoo.ops.attention.attention.parallel import local
from zoo.ops.attention.attention.parallel.lightseq import LightSeq
from zoo.ops.attention.attention.parallel.view import Block, View, view
from zoo.ops.core.algebra import LogSumExp, fold


def work(layout: str, length: int = 32, ranks: int = 4) -> list[list[int]]:
    """Pairs that see each other, by rank and step of a causal ring."""
    seen = view(length, ranks, layout, None, True, None, 1)
    blocks = [[seen.block(r, (r - s) % ranks) for s in range(ranks)] for r in range(ranks)]
    return [[0 if block is None else block.pairs for block in row] for row in blocks]


@pytest.mark.parametrize(("layout", "slowest"), [("contiguous", 228), ("zigzag", 132), ("striped", 144)])
def test_work_of_a_causal_ring(layout: str, slowest: int) -> None:
    """A step ends when its slowest rank does; 32 * 33 / 2 / 4 = 132 is the least."""
    table = work(layout)
    assert sum(map(sum, table)) == 32 * 33 // 2
    assert sum(max(step) for step in zip(*table, strict=True)) == slowest
    if layout == "contiguous":
        assert table == [[36, 0, 0, 0], [36, 64, 0, 0], [36, 64, 64, 0], [36, 64, 64, 64]]
    elif layout == "zigzag":
        assert table == [[36, 32, 32, 32]] * 4
    else:
        assert [set(step) for step in list(zip(*table, strict=True))[1:]] == [{36, 28}] * 3


def test_a_zigzag_ring_needs_no_masks_but_its_first() -> None:
    """Half of the keys for all queries, or half of the queries for all keys."""
    seen = view(32, 4, "zigzag", None, True, None, 1)
    for rank, step in itertools.product(range(4), (1, 2, 3)):
        block = seen.block(rank, (rank - step) % 4)
        assert block is not None
        assert (block.rows, block.columns) == (((0, 8), (0, 4)) if step <= rank else ((4, 8), (0, 8)))
        assert block.pairs == 32


@given(data=st.data())
def test_blocks_are_the_mask(data: Any) -> None:
    ranks, layout = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    length = 2 * ranks * data.draw(st.integers(1, 4))
    cuts = (0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=4))), length)
    causal, window = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, length))
    seen = view.__wrapped__(length, ranks, layout, cuts, causal, window, 1)
    token = torch.arange(length)
    document = torch.tensor([max(i for i, c in enumerate(cuts[:-1]) if c <= t) for t in range(length)])
    distance = token[:, None] - token
    mask = document[:, None] == document
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    for i, j in itertools.product(range(ranks), [*range(ranks), None]):
        columns = token if j is None else seen.seats[j]
        assert torch.equal(as_mask(seen.block(i, j), len(seen.seats[i]), len(columns)), mask[seen.seats[i]][:, columns])


def as_mask(block: Block | None, rows: int, columns: int) -> torch.Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if block is not None:
        place = torch.arange(block.columns[1] - block.columns[0])
        mask[slice(*block.rows), slice(*block.columns)] = (place >= block.begin[:, None]) & (place < block.end[:, None])
        assert block.pairs == mask.sum() > 0
    return mask


@pytest.mark.parametrize("ranks", range(1, 10))
def test_helpers_balance_any_number_of_ranks(ranks: int) -> None:
    """Every block once, what is sent is what is awaited, and nobody is idle but half of an even number at the end."""
    seats = [LightSeq(SimpleNamespace(size=ranks, rank=r), None, 1.0) for r in range(ranks)]  # type: ignore[arg-type]
    done, idle = [], 0
    for time in range(ranks // 2 + 1):
        for r, seat in enumerate(seats):
            source, helped = seat.source(time), seat.helped(time)
            assert source is None or helped is None
            idle += source is None and helped is None
            done += [(r, source)] if source is not None else [(helped, r)] if helped is not None else []
            assert source is None or time == 0 or seats[source].reader(time) == r
            assert helped is None or seats[helped].helper(time) == r
    assert sorted(done) == [(r, s) for r in range(ranks) for s in range(r + 1)]
    assert idle == (0 if ranks % 2 else ranks // 2)  # of ranks * (ranks // 2 + 1) places, where a ring has half idle


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_merge_without_overflow(dtype: torch.dtype) -> None:
    """Log-sum-exps 200 apart either way, and parts that saw nothing, in any order."""
    generator = torch.Generator().manual_seed(0)
    lse = torch.tensor([[0.0, 200.0, -200.0], [200.0, 0.0, 400.0], [-200.0, -200.0, -200.0], [-torch.inf] * 3])
    lse = torch.cat([lse, torch.tensor([[-torch.inf, 3.0, -torch.inf], [5.0, -torch.inf, -torch.inf]])])
    o = torch.randn(6, 3, 2, dtype=torch.float64, generator=generator).masked_fill(lse[..., None] == -torch.inf, 0.0)
    want_o, want_lse = fold([LogSumExp.of(o[:, i], lse[:, i].double()) for i in range(3)]).output()
    for order in itertools.permutations(range(3)):
        total = local.Sum(torch.zeros(1, 6, 1, 2, dtype=dtype), torch.zeros(1, 6, 1, 2, dtype=dtype))
        for i in order:
            total.add((0, 6), o[None, :, i, None].to(dtype), lse[None, :, i, None].to(dtype))
        assert_close(total.o[0, :, 0], want_o.to(dtype))
        assert_close(total.lse[0, :, 0], want_lse.to(dtype))


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_blocks_with_scores_far_apart(gap: float) -> None:
    """Forward and backward by blocks, where one block outweighs the others by exp(200)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 12, 2, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    q[..., 0] = 20.0
    k[:, 4:8, :, 0] += gap / 10.0
    x = [y.requires_grad_() for y in (q, k, v)]
    o, lse = attention(*x, return_lse=True, backend="reference")
    want = torch.autograd.grad(o, x, do)
    seen = View(tuple(torch.arange(12).split(4)), 12, None, True, None)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        total = local.Sum(q[:, rows], v[:, rows])
        for j in (1, 0, 2):
            if (block := seen.block(i, j)) is not None:
                columns = slice(4 * j, 4 * j + 4)
                total.add(block.rows, *local.forward(q[:, rows], k[:, columns], v[:, columns], block=block, scale=0.5))
        assert_close(total.o, o[:, rows])
        assert_close(total.lse, lse[:, rows])
    D = (do * o).sum(-1)
    found = [torch.zeros_like(y) for y in x]
    for i, j in itertools.product(range(3), repeat=2):
        if (block := seen.block(i, j)) is not None:
            rows, columns = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            own = do[:, rows], D[:, rows], lse[:, rows]
            parts = local.backward(q[:, rows], k[:, columns], v[:, columns], *own, block=block, scale=0.5)
            for total_, at, part in zip(found, (rows, columns, columns), parts, strict=True):
                total_[:, at] += part
    for ours, exact in zip(found, want, strict=True):
        assert_close(ours, exact)
