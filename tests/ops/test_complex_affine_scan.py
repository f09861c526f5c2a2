"""The complex affine scan against closed forms; resets, their triples, and transitions that do not change."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.ops import complex_affine_scan, complex_affine_scan_summary
from zoo.ops.core.pairs import as_complex, as_pairs
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.kernels)])


def inputs(T: int, *, constant: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    made = OPERATORS["complex_affine_scan" + " constant" * constant].inputs(2, T, {"D": 5})
    return made["a"], made["b"], made["state"]


def test_closed_forms() -> None:
    a, b, state = inputs(70)
    sums = complex_affine_scan(as_pairs(torch.ones(1, 1, 1, dtype=torch.complex128)), b)[0]
    assert relative_error(sums, b.cumsum(1)) < 1e-13
    powers = as_pairs(as_complex(a).cumprod(1) * as_complex(state)[:, None])
    assert relative_error(complex_affine_scan(a, torch.zeros_like(b), state)[0], powers) < 1e-12


@BACKENDS
@pytest.mark.parametrize("constant", [False, True])
def test_a_reset_is_a_new_start(backend: str, constant: bool) -> None:
    """A row with episodes equals its episodes one by one, gradients included."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    a, b, state = (x.to(dtype).requires_grad_() for x in inputs(40, constant=constant))
    begins = [0, 13, 14, 33]
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, begins[1:]] = True  # the second row has none
    h, last = complex_affine_scan(a, b, state, resets=resets, backend=backend)
    pieces = []
    for left, right in itertools.pairwise([*begins, 40]):
        before = state[:1] if left == 0 else None
        a_ = a if constant else a[:1, left:right]
        pieces.append(complex_affine_scan(a_, b[:1, left:right], before, backend="reference")[0])
    whole = complex_affine_scan(a if constant else a[1:], b[1:], state[1:], backend="reference")[0]
    want = torch.cat([torch.cat(pieces, dim=1), whole])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert relative_error(h, want) < tolerance
    assert relative_error(last, want[:, -1]) < tolerance
    dh = torch.randn_like(h)
    ours, exact = (torch.autograd.grad(x, (a, b, state), dh) for x in (h, want))
    for got, right_one in zip(ours, exact, strict=True):
        assert relative_error(got, right_one) < tolerance


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 2**31))
def test_resets_equal_the_published_operator_on_triples(done: list[bool], seed: int) -> None:
    """(A_i, b_i, d_i) o (A_j, b_j, d_j) = (A_j A_i, A_j b_i + b_j, d_i), or (A_j, b_j, 1) where d_j is set."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(1, len(done), 3, dtype=torch.complex128, generator=g) for _ in range(2))
    h0 = torch.randn(1, 3, dtype=torch.complex128, generator=g)
    A, x, d = torch.ones_like(h0), h0, False
    for t, reset in enumerate(done):
        A, x, d = (a[:, t], b[:, t], True) if reset else (a[:, t] * A, a[:, t] * x + b[:, t], d)
    ours = complex_affine_scan(as_pairs(a), as_pairs(b), as_pairs(h0), resets=torch.tensor([done]))[1]
    assert relative_error(ours, as_pairs(x)) < 1e-12
    element = complex_affine_scan_summary(as_pairs(a), as_pairs(b), resets=torch.tensor([done]))
    assert relative_error(element.apply(as_pairs(h0)), as_pairs(x)) < 1e-12
    assert bool(element.a.any()) != d


@BACKENDS
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_trailing_shape_and_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    b, state = torch.randn(2, 9, *shape, 2), torch.randn(2, *shape, 2)
    for ahead in ((1, 1), (2, 1), (1, 9), (2, 9)):
        a = (0.5 * torch.randn(*ahead, *shape, 2)).requires_grad_()
        whole = a.detach().expand(b.shape).clone().requires_grad_()
        h = complex_affine_scan(a, b, state, backend=backend)[0]
        want = complex_affine_scan(whole, b, state, backend="reference")[0]
        assert relative_error(h, want) < 1e-6
        (da,), (dwhole,) = (torch.autograd.grad(x.sum(), y) for x, y in ((h, a), (want, whole)))
        assert relative_error(da, dwhole.sum_to_size(a.shape)) < 2e-6


@pytest.mark.parametrize("resets", [torch.zeros(2, 9), torch.zeros(9, dtype=torch.bool), [True]])
def test_wrong_resets_are_refused(resets: Tensor) -> None:
    a, b, state = inputs(9)
    with pytest.raises(ValueError, match=r"resets must be a bool tensor \(B, T\) = \(2, 9\); got"):
        complex_affine_scan(a, b, state, resets=resets)


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        complex_affine_scan(*inputs(4), backend="triton")
