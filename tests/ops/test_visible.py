"""Visible: the masks that it can say, and attention by blocks under it against the definition with a dense mask."""

import itertools
import resource
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.ops import Visible, attention
from zoo.ops.attention.attention.tiles import Runs, band_runs, runs
from zoo.ops.core.spec import relative_error

MASKS: dict[str, Callable[[], Visible]] = {
    "causal": lambda: Visible.causal(300),
    "causal behind a past": lambda: Visible.causal(70, S=301),
    "window": lambda: Visible.causal(300, window=70),
    "band": lambda: Visible.band(300, 5, 90),
    "open to the right": lambda: Visible.band(200, 10, None),
    "documents": lambda: Visible.documents([0, 1, 130, 130, 300]),
    "documents both ways": lambda: Visible.documents([0, 1, 130, 300], causal=False),
    "documents, window": lambda: Visible.documents([0, 100, 300], window=9),
    "documents both ways, window": lambda: Visible.documents([0, 100, 300], causal=False, window=9),
    "chunks": lambda: Visible.chunks(300, 64),
    "block diffusion": lambda: Visible.block_diffusion(144, 16),
    "block diffusion, documents": lambda: Visible.block_diffusion(150, 16, cu_seqlens=[0, 1, 70, 70, 150]),
    "tree behind a text per row": lambda: Visible.tree([-1, 0, 0, 1, -1, 4, 3, 2], past=[150, 3], slots=170),
    "tree": lambda: Visible.tree([-1, 0, 0, 1, -1, 4, 3, 2], past=150),
    "two intervals": lambda: two_intervals(150, 190),
    "rows of their own": lambda: Visible(*random_intervals(2, 150, 190)),
    "nothing": lambda: Visible(*(torch.zeros(1, n, dtype=torch.int32) for n in (5, 7, 7))),
}


def random_intervals(B: int, T: int, S: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Labels in any order, and intervals of which some are empty and some queries are in none."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-9, 40, (B, T), generator=generator)
    first = torch.randint(-5, 40, (B, S), generator=generator)
    return label, first, first + torch.randint(-2, 12, (B, S), generator=generator)


def two_intervals(T: int, S: int) -> Visible:
    label, first, end = random_intervals(1, T, S)
    _, first2, end2 = random_intervals(1, T, S, seed=1)
    return Visible(label, first, end, first2, end2)


def inputs(B: int, T: int, S: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T + S)
    shapes = (B, T, 4, 8), (B, S, 2, 8), (B, S, 2, 5)
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over visible keys, pair by pair in one dense product; rows that see none give zeros and -inf."""
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).exp() * mask[:, None]
    total = weights.sum(-1, keepdim=True)
    o = (weights / total.where(total > 0, 1.0)) @ v.transpose(1, 2)
    lse = total.where(total > 0, 1.0).log().where(total > 0, float("-inf")).squeeze(-1)
    return o.transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_a_dense_mask(name: str, backend: str) -> None:
    visible = MASKS[name]()
    T, S = visible.label.shape[1], visible.first.shape[1]
    q, k, v = inputs(2, T, S)
    o, lse = attention(q, k, v, visible=visible, return_lse=True, backend=backend)
    want, want_lse = naive(q, k, v, visible.dense())
    blind = torch.isinf(want_lse)
    assert torch.equal(torch.isinf(lse), blind)
    assert relative_error(o, want) < 1e-12
    assert relative_error(lse.where(~blind, 0.0), want_lse.where(~blind, 0.0)) < 1e-12
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.autograd.grad([o, lse.where(~blind, 0.0)], [q, k, v], [do, dlse])
    exact = torch.autograd.grad([want, want_lse.where(~blind, 0.0)], [q, k, v], [do, dlse])
    for a, b in zip(got, exact, strict=True):
        assert torch.isfinite(a).all()
        assert relative_error(a, b) < 1e-12


@pytest.mark.kernels
@pytest.mark.parametrize("name", MASKS)
def test_kernels_equal_the_definition(name: str) -> None:
    visible = MASKS[name]()
    equal_to_the_definition(visible)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels_take_the_limits_of_integers(dtype: torch.dtype) -> None:
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    label = torch.arange(4)[None].to(dtype)
    first, end = (torch.tensor([row], dtype=dtype) for row in ([least, 3, 3, 3], [9, 9, most, 9]))
    equal_to_the_definition(Visible(label, first, end))


@pytest.mark.kernels
@pytest.mark.everything
@pytest.mark.parametrize("seed", range(50))
def test_kernels_under_random_trees(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, past = (int(torch.randint(1, 90, (), generator=generator)) for _ in range(2))
    parents = [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(n)]
    equal_to_the_definition(Visible.tree(parents, past=past))


def equal_to_the_definition(visible: Visible) -> None:
    """The kernels' outputs and gradients in float32 against the dense mask in float64."""
    q, k, v = inputs(2, visible.label.shape[1], visible.first.shape[1], torch.float32)
    o, lse = attention(q, k, v, visible=visible, return_lse=True, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = naive(*wide, visible.dense())
    blind = torch.isinf(want_lse)
    assert torch.equal(torch.isinf(lse), blind)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.autograd.grad([o, lse.where(~blind, 0.0)], [q, k, v], [do, dlse])
    exact = torch.autograd.grad([want, want_lse.where(~blind, 0.0)], wide, [do.double(), dlse.double()])
    for a, b in zip((o, lse.where(~blind, 0.0), *got), (want, want_lse.where(~blind, 0.0), *exact), strict=True):
        assert torch.isfinite(a).all()
        assert relative_error(a, b) < 2e-6


@pytest.mark.kernels
def test_kernels_do_not_read_what_nobody_sees() -> None:
    visible = Visible.tree([-1, 0, 0], past=40)
    q, k, v = (x.detach() for x in inputs(2, 3, 43, torch.float32))
    end = visible.end.clone()
    end[:, 5:9] = 0
    visible = Visible(visible.label, visible.first, end)
    want = attention(q, k, v, visible=visible, backend="triton")
    k[:, 5:9], v[:, 5:9] = float("nan"), float("inf")
    assert torch.equal(attention(q, k, v, visible=visible, backend="triton"), want)


def covered(table: Runs, row: int, block: int, blocks: int, kind: int) -> set[int]:
    """What the runs of one kind of a block cover."""
    c = 2 * (row * blocks + block) + kind
    return {i for a, b in table.spans[table.offsets[c] : table.offsets[c + 1]].tolist() for i in range(a, b)}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_runs_hold_all_that_is_seen(name: str, of_keys: bool, together: bool) -> None:
    visible = MASKS[name]()
    dense = visible.dense()
    if of_keys:
        dense = dense.mT
    own, other = (16, 32) if of_keys else (32, 16)
    table = runs(visible, 32, 16, of_keys=of_keys, together=together)
    check_runs(table, [dense.any(0), dense.all(0)] if together else None, dense, own, other)


def check_runs(table: Runs, joint: list[Tensor] | None, dense: Tensor, own: int, other: int) -> None:
    """All visible pairs are covered once; what is covered without a mask is visible whole and in whole blocks."""
    blocks = -(-dense.shape[1] // own)
    for row in range(1 if joint else dense.shape[0]):
        some, every = joint if joint else (dense[row], dense[row])
        for block in range(blocks):
            here = slice(block * own, (block + 1) * own)
            masked, whole = (covered(table, row, block, blocks, kind) for kind in (0, 1))
            assert not masked & whole
            assert set(some[here].any(0).nonzero().flatten().tolist()) <= masked | whole
            assert whole <= set(every[here].all(0).nonzero().flatten().tolist())
            assert len(whole) % other == 0
    begin, end = table.spans.unbind(1)
    assert ((begin % other == 0) | (begin >= end)).all()  # an empty run may stand anywhere


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70), st.integers(0, 40), st.none() | st.integers(0, 50), st.none() | st.integers(0, 50), st.data()
)
def test_runs_of_bands_by_arithmetic(
    T: int, more: int, left: int | None, right: int | None, data: st.DataObject
) -> None:
    S = T + more
    start = torch.tensor(data.draw(st.lists(st.integers(0, S), min_size=2, max_size=2)))
    dense = Visible.band(T, left, right, S=S).dense() & (torch.arange(S) >= start[:, None, None])
    for of_keys in (False, True):
        table = band_runs(T, S, left, right, start, 16, 8, of_keys=of_keys)
        check_runs(table, None, dense.mT if of_keys else dense, *((8, 16) if of_keys else (16, 8)))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_behind_cached_keys(causal: bool) -> None:
    q, k, v = inputs(1, 20, 33)
    queries, keys = [0, 4, 4, 20], [0, 10, 12, 33]
    for window in (None, 5):
        visible = Visible.documents(queries, cu_seqlens_k=keys, causal=causal, window=window)
        cuts = {"cu_seqlens": torch.tensor(queries), "cu_seqlens_k": torch.tensor(keys)}
        want = attention(q, k, v, causal=causal, window=window, **cuts)
        assert relative_error(attention(q, k, v, visible=visible), want) < 1e-13


def test_few_keys_and_many_queries_of_a_document_stay_apart() -> None:
    visible = Visible.documents([0, 7, 9], cu_seqlens_k=[0, 2, 6], causal=False)
    want = torch.zeros(9, 6, dtype=torch.bool)
    want[:7, :2] = want[7:, 2:] = True
    assert torch.equal(visible.dense()[0], want)
    assert bool(Visible.band(9, None, None, S=3).dense().all())


@pytest.mark.parametrize("name", MASKS)
def test_pairs_are_those_of_the_dense_mask(name: str) -> None:
    visible = MASKS[name]()
    assert visible.pairs() == int(visible.dense().sum())


@pytest.mark.parametrize(("T", "block"), [(8, 1), (8, 4), (12, 12), (96, 16)])
def test_two_streams_have_as_many_pairs_as_the_paper_says(T: int, block: int) -> None:
    visible = Visible.block_diffusion(T, block)
    assert visible.pairs() == T * (T + block)
    seen = visible.dense()[0]
    for i in range(2 * T):
        for j in range(2 * T):
            noisy_query, noisy_key, b, c = i < T, j < T, i % T // block, j % T // block
            want = (b == c and noisy_query) if noisy_key else (c < b if noisy_query else c <= b)
            assert bool(seen[i, j]) == want


@settings(max_examples=200)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(0, 3))
def test_a_node_of_a_tree_sees_the_text_its_ancestors_and_itself(numbers: list[int], past: int) -> None:
    parents = [number % (node + 1) - 1 for node, number in enumerate(numbers)]
    seen = Visible.tree(parents, past=past).dense()[0]
    for node in range(len(parents)):
        line, at = set(), node
        while at >= 0:
            line.add(at)
            at = parents[at]
        assert seen[node, :past].all()
        assert {j for j in range(len(parents)) if seen[node, past + j]} == line


def test_two_streams_of_packed_documents_are_those_of_each_document() -> None:
    bounds, block = [0, 5, 5, 6, 14], 4
    T = bounds[-1]
    seen = Visible.block_diffusion(T, block, cu_seqlens=bounds).dense()[0]
    want = torch.zeros_like(seen)
    for left, right in itertools.pairwise(bounds):
        n = right - left
        alone = Visible.block_diffusion(n, block).dense()[0].view(2, n, 2, n)
        want.view(2, T, 2, T)[:, left:right, :, left:right] = alone
    assert torch.equal(seen, want)
    with pytest.raises(ValueError, match="must rise from 0 to T = 14 of one stream; got"):
        Visible.block_diffusion(14, 4, cu_seqlens=[0, 5, 12])


@pytest.mark.parametrize("slots", [None, 9])
def test_each_row_of_a_tree_stands_behind_its_own_text(slots: int | None) -> None:
    parents, past = [-1, 0, 0, 2], [0, 3, 5]
    lines = [{0}, {0, 1}, {0, 2}, {0, 2, 3}]
    seen = Visible.tree(parents, past=past, slots=slots).dense()
    assert seen.shape == (3, 4, 9)
    for row, text in enumerate(past):
        for node, line in enumerate(lines):
            want = {*range(text), *(text + i for i in line)}
            assert set(seen[row, node].nonzero().flatten().tolist()) == want
    with pytest.raises(ValueError, match="leave 4 of 8 slots to the nodes; got"):
        Visible.tree(parents, past=past, slots=8)


@pytest.mark.parametrize("masks", [{}, {"window": 100}, {"causal": False}, {"causal": False, "window": 30}])
def test_says_the_masks_that_attention_has_by_name(masks: dict[str, int]) -> None:
    q, k, v = inputs(1, 260, 260)
    window = masks.get("window")
    far = None if window is None else window - 1
    visible = Visible.band(260, far, 0 if masks.get("causal", True) else far)
    got, want = attention(q, k, v, visible=visible), attention(q, k, v, **masks)  # type: ignore[call-overload]
    assert relative_error(got, want) < 1e-13


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends_at_the_limits_of_integers(dtype: torch.dtype) -> None:
    """A key that is seen from the beginning, or to the end, may say so by the least or the largest integer."""
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    label = torch.arange(4)[None].to(dtype)
    first, end = (torch.tensor([row], dtype=dtype) for row in ([least, 3, 3, 3], [9, 9, most, 9]))
    visible = Visible(label, first, end)
    q, k, v = inputs(1, 4, 4)
    assert visible.pairs() == int(visible.dense().sum()) == 7
    assert relative_error(attention(q, k, v, visible=visible), naive(q, k, v, visible.dense())[0]) < 1e-13


def test_gradcheck() -> None:
    visible = two_intervals(5, 6)
    q, k, v = inputs(1, 5, 6)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, visible=visible), (q, k, v))


def test_half_precision_and_no_queries() -> None:
    q, k, v = (x.detach() for x in inputs(1, 40, 40, torch.bfloat16))
    o = attention(q, k, v, visible=Visible.causal(40))
    assert o.dtype == torch.bfloat16
    assert relative_error(o.float(), attention(q.float(), k.float(), v.float())) < 1e-2
    empty = Visible.band(0, None, None, S=5)
    assert attention(q[:, :0], k[:, :5], v[:, :5], visible=empty).shape == (1, 0, 4, 5)


def test_refusals() -> None:
    q, k, v = inputs(2, 4, 4)
    whole = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs both first2 and end2"):
        Visible(whole, whole, whole, whole)
    with pytest.raises(ValueError, match="int32 or int64; got"):
        Visible(whole.float(), whole, whole)
    with pytest.raises(ValueError, match="share rows, dtype and device"):
        Visible(whole, whole.int(), whole.int())
    with pytest.raises(ValueError, match="of the same keys"):
        Visible(whole, whole, whole[:, :3])
    with pytest.raises(ValueError, match="a parent must be an earlier node or -1; node 1 has 1"):
        Visible.tree([-1, 1])
    with pytest.raises(ValueError, match="leave out window, past"):
        attention(q, k, v, window=2, past=torch.zeros(2, dtype=torch.int64), visible=Visible.causal(4))
    with pytest.raises(ValueError, match="T = 4 queries and S = 4 keys on cpu; got 1 rows, 5 queries and 5 keys"):
        attention(q, k, v, visible=Visible.causal(5))


@pytest.mark.everything
def test_memory_grows_with_length_and_not_with_its_square() -> None:
    """At 32,768 tokens a mask of bools alone would be 1 GiB."""
    T = 32768
    q, k, v = (torch.randn(1, T, 1, 16, requires_grad=True) for _ in range(3))
    visible = Visible.documents([0, 5000, T], window=512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention(q, k, v, visible=visible).sum().backward()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200, "MiB"
