"""Taps that stand apart: causal_conv1d with a dilation against torch's own convolution, and at its edges."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import causal_conv1d
from zoo.ops.convolutions.causal_conv1d import shifted
from zoo.ops.core.spec import relative_error

BACKENDS = ["torch", "reference", pytest.param("triton", marks=pytest.mark.kernels)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def conv1d(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """torch's convolution with zeros on the left: nothing of it is ours."""
    halo = (weight.shape[1] - 1) * dilation
    return F.conv1d(F.pad(x.mT, (halo, 0)), weight.unsqueeze(1), dilation=dilation, groups=weight.shape[0]).mT


@pytest.mark.parametrize(
    ("length", "width", "dilation"), [(40, 3, 1), (75, 3, 4), (70, 17, 4), (64, 2, 32), (9, 4, 16)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_that_stand_apart_are_those_of_torch(backend: str, length: int, width: int, dilation: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, weight = (
        torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in ((2, length, 6), (6, width))
    )
    ours, exact = causal_conv1d(x, weight, dilation=dilation, backend=backend)[0], conv1d(x, weight, dilation)
    upstream = torch.randn_like(exact)
    numbers = [(y, *torch.autograd.grad(y, (x, weight), upstream)) for y in (ours, exact)]
    for got, want in zip(*numbers, strict=True):
        assert relative_error(got, want) < (2e-5 if backend == "triton" else 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dilation_of_one_is_the_convolution_as_it_was(backend: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*s, requires_grad=True, device=DEVICE) for s in ((2, 45, 6), (6, 4), (6,), (2, 3, 6))]
    results = []
    for options in ({}, {"dilation": 1}):
        y, tail = causal_conv1d(*tensors, activation="silu", backend=backend, **options)
        results.append((y, tail, *torch.autograd.grad((y.sum() + tail.sum()), tensors)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_blocks_of_phases_change_nothing(activation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 steps of each phase, so that several blocks have neighbours on both sides."""
    monkeypatch.setattr(shifted, "BLOCK_NUMBERS", 1)
    torch.manual_seed(0)
    x, weight, bias, state = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 151, 3), (3, 4), (3,), (2, 9, 3))
    )
    results = []
    for backend in ("torch", "reference"):
        y, tail = causal_conv1d(x, weight, bias, state, activation=activation, dilation=3, backend=backend)
        results.append((y, tail, *torch.autograd.grad(y.square().sum() + tail.sum(), (x, weight, bias, state))))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-12


def test_one_token_at_a_time() -> None:
    """The state is the last (W - 1) dilation inputs, oldest first, and steps of decoding are one call."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 40, 5), (5, 4), (5,)))
    whole, tail = causal_conv1d(x, weight, bias, activation="silu", dilation=7)
    assert torch.equal(tail, x[:, -21:])
    state, outputs = None, []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            y, state = causal_conv1d(token, weight, bias, state, activation="silu", dilation=7)
            outputs.append(y)
    assert state is not None
    assert torch.equal(state, tail)
    assert relative_error(torch.cat(outputs, dim=1), whole) < 1e-12


def test_steps_of_two_dilations_are_two_kinds_of_call() -> None:
    """The quick way of decoding remembers calls by their options: another dilation is not the same call."""
    x, weight, state = torch.randn(1, 1, 4), torch.randn(4, 3), torch.randn(1, 4, 4)
    with torch.no_grad():
        for _ in range(2):
            causal_conv1d(x, weight, None, state, dilation=2)
            with pytest.raises(ValueError, match=r"state must be \(n, \(W-1\)\*dilation, D\)"):
                causal_conv1d(x, weight, None, state, dilation=3)
            with pytest.raises(ValueError, match=r"state must be \(n, W-1, D\)"):
                causal_conv1d(x, weight, None, state)


@pytest.mark.parametrize("dilation", [0, -2, 1.0, True, "2"])
def test_a_dilation_is_a_number_of_steps(dilation: object) -> None:
    with pytest.raises(ValueError, match="dilation must be an integer of at least 1; got"):
        causal_conv1d(torch.randn(1, 5, 4), torch.randn(4, 2), dilation=dilation)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 5, 60])
def test_the_state_does_not_keep_the_input_alive(length: int) -> None:
    _, tail = causal_conv1d(torch.randn(1, length, 6), torch.randn(6, 4), dilation=5)
    assert tail.untyped_storage().nbytes() <= 4 * 16 * 6  # a step keeps one row more


@pytest.mark.kernels
def test_kernels_share_the_rows_of_a_long_state() -> None:
    """A state of more rows than a chunk has tokens: all chunks of a document, or its only one, write its gradient."""
    torch.manual_seed(0)
    tensors = [torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((1, 150, 3), (3, 4), (3, 3 * 40, 3))]
    x, weight, state = tensors
    cu = torch.tensor([0, 7, 7, 150], device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        y, tail = causal_conv1d(x, weight, None, state, dilation=40, cu_seqlens=cu, backend=backend)
        results.append((y, tail, *torch.autograd.grad(y.square().sum() + tail.square().sum(), tensors)))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 2e-5
