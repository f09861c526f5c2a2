"""The scan over a grid beyond what every operator proves: its shapes, directions and second derivatives."""

import pytest
import torch
from torch.testing import assert_close

from zoo.ops import affine_scan, grid_scan
from zoo.ops.core.table import OPERATORS

SPEC = OPERATORS["grid_scan"]


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 7), (7, 1), (5, 12), (12, 5), (6, 6)])
def test_any_shape_of_grid(H: int, W: int) -> None:
    inputs = SPEC.inputs(2, H, {"W": W, "D": 3})
    for ours, exact in zip(SPEC.run(inputs), SPEC.run(inputs, backend="reference"), strict=True):
        assert_close(ours, exact)


def test_without_one_neighbour_it_is_a_scan_of_rows_or_columns() -> None:
    x, a, b, state = SPEC.inputs(2, 6).values()
    down, _ = grid_scan(x, a, b * 0, state)
    exact, _ = affine_scan(a.transpose(1, 2).flatten(0, 1), x.transpose(1, 2).flatten(0, 1), state.flatten(0, 1))
    assert_close(down, exact.unflatten(0, (2, 9)).transpose(1, 2))
    across, _ = grid_scan(x, a * 0, b, state)
    exact, _ = affine_scan(b.flatten(0, 1), x.flatten(0, 1))
    assert_close(across, exact.unflatten(0, (2, 6)))


def test_a_grid_and_its_transpose_agree() -> None:
    x, a, b, _ = SPEC.inputs(2, 6).values()
    turned, _ = grid_scan(x.transpose(1, 2), b.transpose(1, 2), a.transpose(1, 2))
    assert_close(turned.transpose(1, 2), grid_scan(x, a, b)[0])


def test_no_columns_and_no_rows() -> None:
    empty = torch.zeros(2, 0, 4, 3)
    y, last = grid_scan(empty, empty, empty, torch.ones(2, 4, 3))
    assert y.shape == empty.shape
    assert torch.equal(last, torch.ones(2, 4, 3))
    narrow = torch.zeros(2, 4, 0, 3)
    assert grid_scan(narrow, narrow, narrow)[0].shape == narrow.shape


def test_second_derivatives_are_right() -> None:
    inputs = [x.requires_grad_() for x in SPEC.inputs(1, 3, {"W": 4, "D": 2}).values()]
    assert torch.autograd.gradgradcheck(lambda *args: grid_scan(*args, backend="torch"), inputs)


def test_there_is_no_kernel() -> None:
    x = torch.zeros(1, 2, 2, 1)
    with pytest.raises(ValueError, match="grid_scan: there is no Triton form"):
        grid_scan(x, x, x, backend="triton")
