"""The long convolution against torch's own, its lengths, and packing into groups."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from zoo.ops import fft_convolution, shard
from zoo.ops.convolutions.fft_convolution.fourier import fast_length
from zoo.ops.core import documents
from zoo.ops.core.spec import relative_error


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("T", "L"), [(1, 1), (7, 20), (20, 7), (128, 128), (1000, 999)])
def test_agrees_with_torchs_convolution(T: int, L: int) -> None:
    u, k, D = randn(2, T, 3), randn(3, L), randn(3)
    want = torch.nn.functional.conv1d(u.mT, k.flip(-1)[:, None], padding=L - 1, groups=3)[..., :T].mT + D * u
    assert relative_error(fft_convolution(u, k, D), want) < 1e-13


@given(st.integers(1, 100_000))
def test_fast_lengths(n: int) -> None:
    length = fast_length(n)
    assert n <= length < max(3, 1.3 * n + 2)
    assert length % 2 == 0
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    assert length == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 90), max_size=20))
def test_groups_hold_every_document_once_with_little_padding(cuts: list[int]) -> None:
    bounds = (0, *sorted(cuts), 90)
    made = documents.groups(bounds, torch.device("cpu"))
    x, back = torch.arange(90)[None, :, None].float() + 1, []
    for group in made:
        rows = documents.gather(x, group)
        back.append(rows)
        for i, row in zip(group.documents.tolist(), rows, strict=True):
            left, right = bounds[i], bounds[i + 1]
            assert row[row > 0].tolist() == x[0, left:right, 0].tolist()
            assert (row[: len(row) - (right - left)] == 0).all()
    assert torch.equal(documents.scatter(back, made, 90), x)
    assert sum(group.places.numel() for group in made) <= 2 * 90
    filled = [i for i, (left, right) in enumerate(itertools.pairwise(bounds)) if left < right]
    assert sorted(i for group in made for i in group.documents.tolist()) == filled


@pytest.mark.parametrize("shape", [(1, 0, 3), (0, 5, 3)])
def test_nothing_to_convolve(shape: tuple[int, ...]) -> None:
    assert fft_convolution(randn(*shape), randn(3, 4), randn(3)).shape == shape


def test_a_triton_form_is_refused_and_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"(no Triton form|needs CUDA tensors|needs the triton package)"):
        fft_convolution(randn(1, 4, 3), randn(3, 4), backend="triton")


def test_a_sequence_that_is_cut_across_ranks_is_refused() -> None:
    """Its outputs look at all inputs before them, and nothing sums those up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with shard.use(shard.SequenceShard()), pytest.raises(ValueError, match="fft_convolution, which has no state"):
            fft_convolution(randn(1, 4, 3), randn(3, 4), None)
    finally:
        dist.destroy_process_group()
