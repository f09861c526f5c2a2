"""The affine scans against closed forms and an implementation that is not ours; resets; every cut into chunks."""

import itertools

import pytest
import torch
from torch import Tensor

from zoo.ops import affine_scan, affine_scan_summary
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.scans.affine_scan.two_level import affine_scan_two_level

SPEC = OPERATORS["affine_scan"]


def inputs(T: int, *, B: int = 2, D: int = 5, documents: int | None = None) -> dict[str, Tensor]:
    return SPEC.inputs(B, T, {"D": D}, documents=documents)


@pytest.mark.parametrize("T", [1, 40, 130])
def test_agrees_with_flash_linear_attention(T: int) -> None:
    naive = pytest.importorskip("fla.ops.hgrn.naive", reason="needs flash-linear-attention; install the extra parity")
    a, b, state = (x.float() for x in inputs(T).values())
    ours = affine_scan(a.abs(), b, state)
    theirs = naive.naive_recurrent_hgrn(b, a.abs().log(), initial_state=state, output_final_state=True)
    for got, want in zip(ours, theirs, strict=True):
        assert relative_error(got, want) < 1e-5


def test_closed_forms() -> None:
    a, b, state = inputs(70).values()
    assert relative_error(affine_scan(torch.ones_like(b), b)[0], b.cumsum(1)) < 1e-13
    assert relative_error(affine_scan(a, torch.zeros_like(b), state)[0], a.cumprod(1) * state[:, None]) < 1e-13


@pytest.mark.parametrize("T", [1, 2, 3, 16, 75])
def test_any_number_of_chunks_changes_nothing(T: int) -> None:
    given = [x.requires_grad_() for x in inputs(T).values()]
    exact = affine_scan(*given, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, given, cotangents))
    for chunks in {1, 2, 3, 7, 16, T} & {*range(T + 1)}:
        ours = affine_scan_two_level(*given, None, chunks=chunks)
        found = (*ours, *torch.autograd.grad(ours, given, cotangents))
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_reset_is_a_new_start(backend: str) -> None:
    """A row with episodes equals its episodes one by one, gradients included."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    a, b, state = (x.to(dtype).requires_grad_() for x in inputs(40).values())
    begins = [0, 13, 14, 33]
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, begins[1:]] = True  # the second row has none
    h, last = affine_scan(a, b, state, resets=resets, backend=backend)
    pieces = []
    for left, right in itertools.pairwise([*begins, 40]):
        before = state[:1] if left == 0 else None
        pieces.append(affine_scan(a[:1, left:right], b[:1, left:right], before, backend="reference")[0])
    whole = affine_scan(a[1:], b[1:], state[1:], backend="reference")[0]
    want = torch.cat([torch.cat(pieces, dim=1), whole])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert relative_error(h, want) < tolerance
    assert relative_error(last, want[:, -1]) < tolerance
    dh = torch.randn_like(h)
    ours, exact = (torch.autograd.grad(x, (a, b, state), dh) for x in (h, want))
    for got, right_one in zip(ours, exact, strict=True):
        assert relative_error(got, right_one) < tolerance


def test_a_reset_ends_a_summary() -> None:
    a, b, state = inputs(20).values()
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[:, 7] = True
    element = affine_scan_summary(a, b, resets=resets)
    assert not element.a.any()
    assert relative_error(element.apply(state), affine_scan(a, b, state, resets=resets)[1]) < 1e-13


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_any_trailing_shape(shape: tuple[int, ...], backend: str) -> None:
    a, b = torch.rand(2, 9, *shape), torch.randn(2, 9, *shape)
    state = torch.randn(2, *shape)
    for got, want in zip(
        affine_scan(a, b, state, backend=backend), affine_scan(a, b, state, backend="reference"), strict=True
    ):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 1), (1, 9, 4)])
def test_transitions_are_broadcast(shape: tuple[int, ...]) -> None:
    a, b = torch.rand(shape, dtype=torch.float64).requires_grad_(), torch.randn(2, 9, 4, dtype=torch.float64)
    whole = a.detach().expand(b.shape).clone().requires_grad_()
    h, want = affine_scan(a, b)[0], affine_scan(whole, b)[0]
    assert torch.equal(h, want)
    (da,), (dwhole,) = (torch.autograd.grad(x.sum(), y) for x, y in ((h, a), (want, whole)))
    assert relative_error(da, dwhole.sum_to_size(shape)) < 1e-13


def test_a_later_step_changes_no_earlier_state() -> None:
    a, b, state = inputs(60).values()
    h, _ = affine_scan(a, b, state)
    a[:, 45] += 1
    b[:, 45] += 1
    changed, _ = affine_scan(a, b, state)
    assert torch.equal(h[:, :45], changed[:, :45])
    assert not torch.equal(h[:, 45], changed[:, 45])


def test_inputs_and_cotangents_are_left_alone() -> None:
    given = [x.requires_grad_() for x in inputs(64).values()]
    before = [x.detach().clone() for x in given]
    h, last = affine_scan(*given)
    dh, dlast = torch.randn_like(h), torch.randn_like(last)
    kept = dh.clone(), dlast.clone()
    torch.autograd.grad((h, last), given, (dh, dlast))
    assert torch.equal(dh, kept[0])
    assert torch.equal(dlast, kept[1])
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_nothing_but_empty_documents() -> None:
    given = inputs(0, B=1, documents=3)
    h, last = affine_scan(**given, cu_seqlens=torch.tensor([0, 0, 0, 0]))
    assert h.shape == given["b"].shape
    assert torch.equal(last, given["state"])


def test_packed_half_precision_adds_in_float32() -> None:
    a, b, state = inputs(50, B=1, documents=3).values()
    cu = torch.tensor([0, 20, 20, 50])
    _, last = affine_scan(a.bfloat16(), b.bfloat16(), state, cu_seqlens=cu)
    exact = affine_scan(a.bfloat16().double(), b.bfloat16().double(), state, cu_seqlens=cu, backend="reference")[1]
    assert last.dtype == torch.float32
    assert relative_error(last, exact) < 1e-6


def test_only_a_and_the_states_are_kept() -> None:
    a, b = (torch.randn(1, 200, 8).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        affine_scan(a, b)
    assert sum(x.numel() for x in kept) <= 2 * a.numel() + 8


@pytest.mark.parametrize(
    "resets", [torch.zeros(2, 9), torch.zeros(9, dtype=torch.bool), [True]], ids=["float", "shape", "list"]
)
def test_wrong_resets_are_refused(resets: Tensor) -> None:
    given = inputs(9)
    with pytest.raises(ValueError, match=r"affine_scan: resets must be a bool tensor \(B, T\) = \(2, 9\); got"):
        affine_scan(**given, resets=resets)


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        affine_scan(**inputs(4), backend="triton")
