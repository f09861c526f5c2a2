"""The damped moving average against MEGA's own formula: a long convolution with the kernel of its averages."""

import itertools

import pytest
import torch

from zoo.ops import damped_ema, fft_convolution
from zoo.ops.core.spec import relative_error
from zoo.ops.scans.damped_ema import chunked
from zoo.ops.scans.damped_ema.reference import damped_ema_reference


def mega(D: int, N: int, T: int) -> tuple[torch.Tensor, ...]:
    """MEGA's parameters at their published start, and its kernel (arXiv 2209.10655, section 3.3): a, b, c, k (D, T)."""
    torch.manual_seed(0)
    delta, alpha = (0.2 * torch.randn(D, N, dtype=torch.float64) for _ in range(2))
    beta = (-1.0) ** torch.arange(N) + 0.02 * torch.randn(D, N, dtype=torch.float64)
    gamma = torch.randn(D, N, dtype=torch.float64)
    p = delta.sigmoid()
    q = 1 - p * alpha.sigmoid()
    powers = torch.exp(torch.arange(T) * q.log().unsqueeze(-1))  # (D, N, T)
    kernel = (gamma.unsqueeze(-1) * N**-0.5 * (p * beta).unsqueeze(-1) * powers).sum(1)
    return q, p * beta, gamma * N**-0.5, kernel


@pytest.mark.parametrize("length", [1, 16, 100, 513])
def test_averages_are_the_convolution_of_their_paper(length: int) -> None:
    a, b, c, kernel = mega(5, 16, length)
    x = torch.randn(2, length, 5, dtype=torch.float64)
    y, _ = damped_ema(x, a, b, c)
    assert relative_error(y, fft_convolution(x, kernel)) < 1e-10
    explicit = torch.stack([(kernel[:, : t + 1].flip(1) * x[:, : t + 1].mT).sum(-1) for t in range(length)], dim=1)
    assert relative_error(y, explicit) < 1e-12


def test_steps_of_decoding_are_one_pass() -> None:
    a, b, c, _ = mega(5, 8, 1)
    x = torch.randn(2, 70, 5, dtype=torch.float64)
    whole, last = damped_ema(x, a, b, c)
    state, outputs = None, []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            y, state = damped_ema(token, a, b, c, state)
            outputs.append(y)
    assert state is not None
    assert relative_error(torch.cat(outputs, dim=1), whole) < 1e-10
    assert relative_error(state, last) < 1e-10


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
@pytest.mark.parametrize("cuts", [None, (0, 0, 1, 65, 65, 150)], ids=["batch", "packed"])
def test_the_cut_into_chunks_changes_nothing(chunk: int, cuts: tuple[int, ...] | None) -> None:
    a, b, c, _ = mega(3, 4, 1)
    documents = [(0, 150)] if cuts is None else list(itertools.pairwise(cuts))
    x, state = torch.randn(1, 150, 3, dtype=torch.float64), torch.randn(len(documents), 3, 4, dtype=torch.float64)
    y, last = chunked.damped_ema_chunked(x, a, b, c, state, cuts, chunk=chunk)
    for i, (left, right) in enumerate(documents):
        exact, end = damped_ema_reference(x[:, left:right], a, b, c, state[i : i + 1])
        assert relative_error(y[:, left:right], exact) < 1e-12
        assert relative_error(last[i : i + 1], end) < 1e-12


@pytest.mark.parametrize("segment", [1, 150, 1000])
def test_segments_change_nothing(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16, 16 and 160 tokens hand the averages on; gradients go back through all of them."""
    monkeypatch.setattr(chunked, "SEGMENT", segment)
    leaves = [z.requires_grad_() for z in mega(3, 4, 1)[:3]]
    x, state = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 203, 3), (2, 3, 4)))
    results = []
    for backend in ("torch", "reference"):
        y, last = damped_ema(x, *leaves, state, backend=backend)
        gradients = torch.autograd.grad(y.square().sum() + last.square().sum(), (x, *leaves, state))
        results.append((y, last, *gradients))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-10


def test_a_slow_average_is_not_rounded_to_bfloat16() -> None:
    """What is left after a step, 0.999, is 1.0 in bfloat16: the decays stay in the dtype that they are given in."""
    x, a = torch.ones(1, 3000, 1), torch.tensor([[0.999]])
    b = c = torch.ones(1, 1)
    exact, _ = damped_ema(x.double(), a.double(), b.double(), c.double())
    ours, last = damped_ema(x.bfloat16(), a, b.bfloat16(), c.bfloat16())
    assert last.dtype == torch.float32
    assert relative_error(ours.double(), exact) < 2e-2
    assert last.item() == pytest.approx(1000 * (1 - 0.999**3000), rel=1e-3)
