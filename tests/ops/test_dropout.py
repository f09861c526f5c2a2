"""Dropout by address: the generator's published words, statistics, cuts, and forms that draw the same mask."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from zoo.ops import dropout
from zoo.ops.core import dispatch
from zoo.ops.core.spec import parity, red
from zoo.ops.core.table import OPERATORS
from zoo.ops.token_wise.dropout.philox import keep_mask, philox_words
from zoo.ops.token_wise.dropout.reference import philox
from zoo.train.data.synthetic import _philox

# Random123's known answers, kat_vectors: counter, key, words
KNOWN = (
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_the_published_ones(counter: Any, key: int, words: Any) -> None:
    assert philox(counter, key) == words
    assert [int(w) for w in philox_words(*(torch.tensor([c]) for c in counter), key)] == list(words)
    numpy = _philox.philox(*(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(numpy[0].tolist()) == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_mean(p: float) -> None:
    """Within five standard deviations, over all numbers, each channel, each position and neighbours together."""
    B, T, D = 8, 64, 96
    y = dropout(torch.ones(B, T, D, dtype=torch.float64), p, 12345)
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))

    def within(mask: torch.Tensor, share: float) -> bool:
        return abs(float(mask.double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / mask.numel())

    assert within(kept, 1 - p)
    assert all(within(kept[..., d], 1 - p) for d in range(D))
    assert all(within(kept[:, t], 1 - p) for t in range(T))
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.roll(4, 2)):
        assert within(kept & other, (1 - p) ** 2)


def test_seeds_streams_and_addresses_are_told_apart() -> None:
    x = torch.ones(2, 16, 64)
    base = dropout(x, 0.5, 1)
    others = [dropout(x, 0.5, 2), dropout(x, 0.5, 1 + 2**40), dropout(x, 0.5, 1, stream=1)]
    for i, mask in enumerate([base, *others]):
        assert torch.equal(mask, [base, *others][i])
        for other in [base, *others][i + 1 :]:
            assert 0.4 < float((mask == other).double().mean()) < 0.6
    assert torch.equal(dropout(x, 0.5, 1), base)


def test_any_part_has_the_mask_of_the_whole() -> None:
    x = torch.randn(3, 10, 7, dtype=torch.float64)
    whole = dropout(x, 0.4, 9)
    rows, positions = torch.meshgrid(torch.arange(3), torch.arange(10), indexing="ij")
    at = torch.stack([rows, positions])
    assert torch.equal(dropout(x[1:, 4:], 0.4, 9, at=at[:, 1:, 4:]), whole[1:, 4:])
    assert not torch.equal(dropout(x[:, 4:], 0.4, 9), whole[:, 4:])  # its own beginning is not the whole's
    line = dropout(x.view(1, 30, 7)[:, 5:21], 0.4, 9, at=at.view(2, 1, 30)[:, :, 5:21])  # tiles of tokens in one line
    assert torch.equal(line, whole.view(1, 30, 7)[:, 5:21])


def test_nothing_is_dropped_at_zero_and_nearly_all_near_one() -> None:
    x = torch.randn(2, 5, 6)
    assert torch.equal(dropout(x, 0.0, 3), x)
    assert not dropout(x, 1 - 1e-12, 3).any()


def test_what_is_dropped_may_be_infinite() -> None:
    x = torch.full((1, 4, 8), float("inf")).requires_grad_()
    y = dropout(x, 0.5, 3)
    assert not y.isnan().any()
    (d,) = torch.autograd.grad(y.where(y == 0, 0).sum(), x)
    assert not d.isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"p": -0.1}, r"dropout must be in \[0, 1\); got -0.1"),
        ({"p": float("nan")}, r"dropout must be in \[0, 1\); got nan"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\); got -1"),
        ({"stream": 2**32}, r"stream must be in \[0, 2\*\*32\); got 4294967296"),
        ({"at": torch.zeros(2, 1, 3)}, r"at must be \(2, B, T\) = \(2, 1, 4\) on cpu; got \(2, 1, 3\)"),
        ({"x": torch.zeros(4, 8)}, r"x must be \(B, T, D\)"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout(**{"x": torch.zeros(1, 4, 8), "p": 0.1, "seed": 0, **changes})


SPEC = OPERATORS["dropout"]


FORMS = [
    pytest.param(backend, dtype, marks=[pytest.mark.kernels] * (backend == "triton"), id=f"{backend}-{dtype}")
    for backend in ("torch", "triton")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if not (backend == "triton" and dtype == torch.bfloat16 and dispatch.INTERPRETED)  # which is refused
]


@pytest.mark.parametrize("sizes", SPEC.sizes)
@pytest.mark.parametrize("length", [0, 1, 17, 64])
@pytest.mark.parametrize(("backend", "dtype"), FORMS)
def test_values_and_gradients_equal_the_loop(
    backend: str, dtype: torch.dtype, length: int, sizes: dict[str, int]
) -> None:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    errors = parity(SPEC, SPEC.inputs(2, length, sizes), backend=backend, dtype=dtype, device=device)
    assert not red(errors, dtype)


@pytest.mark.kernels
def test_the_custom_op_keeps_its_contract() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, at = torch.randn(2, 5, 9, device=device), _at(2, 5, device)
    torch.library.opcheck(torch.ops.zoo.dropout_fwd, (x.requires_grad_(), 2**31, 2.0, 2**62 + 1, 3, at))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, *([] if dispatch.INTERPRETED else [torch.bfloat16])], ids=str
)
def test_the_kernel_draws_the_same_bits(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 37, 21, device=device).to(dtype)
    for seed, p in ((0, 0.5), (2**62 + 12345, 0.1)):
        ours = dropout(x, p, seed, stream=3, backend="triton")
        assert torch.equal(ours, dropout(x, p, seed, stream=3, backend="torch"))
        assert torch.equal(ours != 0, keep_mask(21, round(p * 2**32), seed, 3, _at(2, 37, device)))


def _at(B: int, T: int, device: str) -> torch.Tensor:
    return torch.stack(torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij")).to(device)
