"""What only the torch form of the causal convolution has: blocks of time, and a state that stands alone."""

import pytest
import torch

from zoo.ops import causal_conv1d
from zoo.ops.convolutions.causal_conv1d import shifted
from zoo.ops.core.spec import relative_error


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (15, 4), (16, 4), (17, 4), (18, 6), (50, 4), (48, 1)])
def test_blocks_change_nothing(
    length: int, width: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifted, "BLOCK_NUMBERS", 1)  # blocks of BLOCK_MIN = 16 steps
    x, state, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, length, 5), (2, width - 1, 5), (5, width), (5,))
    )
    cuts = list(shifted._blocks(x))
    assert cuts == [(left, min(left + 16, length)) for left in range(0, length, 16)]
    found = []
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        out = causal_conv1d(x, weight, bias, state, activation=activation, backend=backend)
        cotangents = [torch.randn_like(z) for z in out]
        found.append((*out, *torch.autograd.grad(out, (x, weight, bias, state), cotangents)))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-12 if exact.numel() else ours.shape == exact.shape


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_state_does_not_keep_the_input_alive(length: int) -> None:
    x = torch.randn(1, length, 6)
    _, tail = causal_conv1d(x, torch.randn(6, 4))
    assert tail.untyped_storage().nbytes() <= 4 * 4 * 6 < 40 * 4 * 6


def test_gradients_of_taps_accumulate_in_float32() -> None:
    x, weight, bias = torch.randn(1, 4096, 4), torch.randn(4, 3), torch.randn(4)
    exact = torch.autograd.grad(
        causal_conv1d(*(leaves := [z.bfloat16().double().requires_grad_() for z in (x, weight, bias)]))[0].sum(),
        leaves,
    )
    ours = torch.autograd.grad(
        causal_conv1d(*(leaves := [z.bfloat16().requires_grad_() for z in (x, weight, bias)]))[0].sum(), leaves
    )
    for got, want in zip(ours, exact, strict=True):
        assert relative_error(got.double(), want) < 4e-3
