"""Quasiseparable mixing against its matrix, element by element, and what makes a matrix quasiseparable."""

import pytest
import torch

from zoo.ops import quasiseparable
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.state_spaces.quasiseparable.reference import quasiseparable_matrix

SPEC = OPERATORS["quasiseparable"]
SIZES = {"H": 2, "P": 3, "G": 1, "N": 4}


def inputs(T: int, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return SPEC.inputs(1, T, SIZES) | changes


def matrix_of(i: dict[str, torch.Tensor]) -> torch.Tensor:
    """(H, T, T) from the operator alone: its outputs for the unit vectors of time."""
    T = i["x"].shape[1]
    units = torch.eye(T, dtype=torch.float64)[:, :, None, None].expand(T, T, SIZES["H"], 1)
    each = {name: i[name].expand(T, *i[name].shape[1:]) for name in ("dt", "B", "C", "D")}
    return quasiseparable(units, A=i["A"], **each)[..., 0].permute(2, 1, 0)


@pytest.mark.parametrize("T", [1, 2, 6, 32, 70])
def test_two_scans_are_the_matrix_of_the_definition(T: int) -> None:
    """Every element written out as the official code computes it, not by the reference."""
    i = inputs(T)
    dt, A, B, C, D = (i[name][0] if name != "A" else i[name] for name in ("dt", "A", "B", "C", "D"))
    want = torch.zeros(SIZES["H"], T, T, dtype=torch.float64)
    for h in range(SIZES["H"]):
        a = (dt[..., h] * A[h]).exp()  # (T, 2)
        for row in range(T):
            for column in range(T):
                if row > column:
                    read, write = C[row - 1, 0, 0], dt[column, 0, h] * B[column, 0, 0]
                    want[h, row, column] = read @ write * a[column + 1 : row, 0].prod()
                elif row < column:
                    read, write = C[row + 1, 1, 0], dt[column, 1, h] * B[column, 1, 0]
                    want[h, row, column] = read @ write * a[row + 1 : column, 1].prod()
                else:
                    want[h, row, row] = D[row, h]
    assert relative_error(matrix_of(i), want) < 1e-12
    assert relative_error(quasiseparable_matrix(i["dt"], i["A"], i["B"], i["C"], i["D"])[0], want) < 1e-12
    assert relative_error(quasiseparable(**i)[0], torch.einsum("hij,jhp->ihp", want, i["x"][0])) < 1e-12


def test_off_diagonal_blocks_have_the_rank_of_the_state() -> None:
    M = matrix_of(inputs(24))
    for cut in range(1, 24):
        for block in (M[:, cut:, :cut], M[:, :cut, cut:]):
            wanted = min(SIZES["N"], cut, 24 - cut)
            assert (torch.linalg.matrix_rank(block, rtol=1e-12) == wanted).all(), cut
    assert (torch.linalg.matrix_rank(M) == 24).all()  # the matrix itself has no low rank


def test_without_a_diagonal_no_token_reaches_itself() -> None:
    i = inputs(20)
    M = matrix_of(i | {"D": i["D"] * 0})
    assert (M.diagonal(dim1=1, dim2=2) == 0).all()
    assert (M[:, 1:, :-1].diagonal(dim1=1, dim2=2) != 0).all()
    assert torch.equal(quasiseparable(**i | {"D": None}), quasiseparable(**i | {"D": i["D"] * 0}))


def test_a_tokens_own_parameters_never_act_on_its_output() -> None:
    i = inputs(20)
    changed = {name: i[name].clone() for name in ("dt", "B", "C")}
    for z in changed.values():
        z[:, 9] += 1.0
    y, other = quasiseparable(**i), quasiseparable(**i | changed)
    assert torch.equal(y[:, 9], other[:, 9])
    assert not torch.isclose(y, other).flatten(2).all(-1)[0, torch.arange(20) != 9].any()


def test_time_reversed_and_directions_swapped_is_the_output_reversed() -> None:
    i = inputs(33)
    turned = {name: i[name].flip(1, 2) for name in ("dt", "B", "C")} | {name: i[name].flip(1) for name in ("x", "D")}
    assert relative_error(quasiseparable(**i | turned).flip(1), quasiseparable(**i)) < 1e-12


def test_groups_must_divide_the_heads() -> None:
    i = SPEC.inputs(1, 5)
    with pytest.raises(ValueError, match=r"quasiseparable: the number of heads must be a multiple .*H = 3, G = 2"):
        quasiseparable(i["x"][:, :, :3], i["dt"][..., :3], i["A"][:3], i["B"], i["C"])
