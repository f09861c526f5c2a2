"""The scan of 2x2 blocks against complex numbers, matrix products and the elementwise scan; layouts; chunks."""

import pytest
import torch
from torch import Tensor

from zoo.ops import affine_scan, block_affine_scan
from zoo.ops.core.spec import convert, parity, red, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.scans.block_affine_scan.two_level import block_affine_scan_two_level

SPEC = OPERATORS["block_affine_scan"]


def inputs(T: int, *, B: int = 2, D: int = 5, documents: int | None = None) -> dict[str, Tensor]:
    return SPEC.inputs(B, T, {"D": D}, documents=documents)


def planes(x: Tensor, last: int) -> Tensor:
    """The same values with the last dimensions outermost in memory."""
    dims = tuple(range(-last, 0))
    return x.movedim(dims, tuple(range(last))).contiguous().movedim(tuple(range(last)), dims)


def test_rotations_are_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 30, 3, dtype=torch.complex128, generator=generator) * 0.7
    b, h = (torch.randn(2, 30, 3, dtype=torch.complex128, generator=generator) for _ in range(2))
    A = torch.stack([torch.stack([z.real, -z.imag], -1), torch.stack([z.imag, z.real], -1)], -2)
    ours, last = block_affine_scan(A, torch.view_as_real(b), torch.view_as_real(h[:, 0]).contiguous())
    powers = z.cumprod(1)
    # h_t = P_t h_0 + sum_{s <= t} P_t / P_s b_s
    weights = (powers[:, :, None] / powers[:, None]).permute(0, 3, 1, 2).tril()
    want = powers * h[:, :1] + torch.einsum("bdts,bsd->btd", weights, b)
    assert relative_error(ours, torch.view_as_real(want)) < 1e-9  # the quotients lose digits, not the scan
    assert torch.equal(last, ours[:, -1])


def test_the_last_state_is_a_product_of_matrices() -> None:
    A, _, state = inputs(12).values()
    _, last = block_affine_scan(A, torch.zeros_like(SPEC.inputs(2, 12)["b"]), state)
    M = torch.linalg.multi_dot([A[0, t, 0] for t in reversed(range(12))])
    assert relative_error(last[0, 0], M @ state[0, 0]) < 1e-12


def test_diagonal_blocks_are_two_elementwise_scans() -> None:
    A, b, state = inputs(40).values()
    A = A * torch.eye(2)
    h, last = block_affine_scan(A, b, state)
    want, end = affine_scan(A.diagonal(dim1=-2, dim2=-1), b, state)
    assert relative_error(h, want) < 1e-13
    assert relative_error(last, end) < 1e-13


@pytest.mark.parametrize("T", [1, 2, 3, 16, 75])
def test_any_number_of_chunks_changes_nothing(T: int) -> None:
    given = [x.requires_grad_() for x in inputs(T).values()]
    exact = block_affine_scan(*given, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, given, cotangents))
    A, b, state = given
    for chunks in {1, 2, 3, 7, 16, T} & {*range(T + 1)}:
        h, last = block_affine_scan_two_level(
            A.permute(3, 4, 0, 1, 2), b.movedim(-1, 0), state.movedim(-1, 0), None, chunks=chunks
        )
        ours = h.movedim(0, -1), last.movedim(0, -1)
        found = (*ours, *torch.autograd.grad(ours, given, cotangents))
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 1e-12


def test_planes_are_not_copied() -> None:
    A, b, _ = inputs(20).values()
    assert torch.equal(block_affine_scan(planes(A, 2), planes(b, 1))[0], block_affine_scan(A, b)[0])
    h, _ = block_affine_scan(planes(A, 2), planes(b, 1))
    assert h[..., 0].is_contiguous()
    assert h[..., 1].is_contiguous()
    leaf = planes(A, 2).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        block_affine_scan(leaf, planes(b, 1))
    assert leaf.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in kept}
    assert sum(x.numel() for x in kept) <= A.numel() + b.numel() + b[:, 0].numel()


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_any_trailing_shape(shape: tuple[int, ...]) -> None:
    A, b, state = torch.rand(2, 9, *shape, 2, 2), torch.randn(2, 9, *shape, 2), torch.randn(2, *shape, 2)
    ours, want = (block_affine_scan(A, b, state, backend=backend) for backend in ("torch", "reference"))
    for got, right in zip(ours, want, strict=True):
        assert got.shape == right.shape
        assert relative_error(got, right) < 1e-6


@pytest.mark.kernels
def test_kernels_cover_several_blocks_of_channels() -> None:
    errors = parity(SPEC, inputs(3, D=70), backend="triton", dtype=torch.float32)
    assert not red(errors, torch.float32)


def test_a_later_step_changes_no_earlier_state() -> None:
    A, b, state = inputs(60).values()
    h, _ = block_affine_scan(A, b, state)
    A[:, 45] += 1
    b[:, 45] += 1
    changed, _ = block_affine_scan(A, b, state)
    assert torch.equal(h[:, :45], changed[:, :45])
    assert not torch.equal(h[:, 45], changed[:, 45])


def test_inputs_and_cotangents_are_left_alone() -> None:
    given = [planes(x, 2 - (i > 0)).requires_grad_() for i, x in enumerate(inputs(64).values())]
    before = [x.detach().clone() for x in given]
    h, last = block_affine_scan(*given)
    dh, dlast = planes(torch.randn_like(h), 1), planes(torch.randn_like(last), 1)
    kept = dh.clone(), dlast.clone()
    torch.autograd.grad((h, last), given, (dh, dlast))
    assert torch.equal(dh, kept[0])
    assert torch.equal(dlast, kept[1])
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_nothing_but_empty_documents() -> None:
    given = inputs(0, B=1, documents=3)
    h, last = block_affine_scan(**given, cu_seqlens=torch.tensor([0, 0, 0, 0]))
    assert h.shape == given["b"].shape
    assert torch.equal(last, given["state"])


def test_packed_half_precision_adds_in_float32() -> None:
    given, cu = convert(inputs(50, B=1, documents=3), torch.bfloat16), torch.tensor([0, 20, 20, 50])
    _, last = block_affine_scan(**given, cu_seqlens=cu)
    wide = {name: x.double() for name, x in given.items()}
    assert last.dtype == torch.float32
    assert relative_error(last, block_affine_scan(**wide, cu_seqlens=cu, backend="reference")[1]) < 1e-6


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        block_affine_scan(**inputs(4), backend="triton")
