"""State space duality against implementations that are not ours, and against gated linear attention."""

import pytest
import torch

from zoo.ops import gated_linear_attention, ssd
from zoo.ops.core import decay
from zoo.ops.core.spec import outputs_and_gradients, parity, red, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.state_spaces.ssd.chunked import ssd_chunked

SPEC = OPERATORS["ssd"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("T", [1, 37, 130])
def test_agrees_with_flash_linear_attention(T: int) -> None:
    naive = pytest.importorskip(
        "fla.ops.simple_gla.naive", reason="needs flash-linear-attention; install the extra parity"
    )
    i = {name: x.float() for name, x in SPEC.inputs(2, T).items()}
    repeats = i["x"].shape[2] // i["B"].shape[2]
    B, C = (i[name].repeat_interleave(repeats, dim=2) for name in "BC")
    theirs = naive.naive_recurrent_simple_gla(
        C, B, i["x"] * i["dt"].unsqueeze(-1), i["dt"] * i["A"], scale=1.0, initial_state=i["state"],
        output_final_state=True,
    )  # fmt: skip
    ours = ssd(**i | {"D": None})
    for got, want in zip(ours, theirs, strict=True):
        assert relative_error(got, want) < 1e-5


def test_it_is_gated_linear_attention_with_one_gate_a_head() -> None:
    i = SPEC.inputs(2, 100, {"H": 2, "P": 12, "G": 2, "N": 8})
    g = (i["dt"] * i["A"]).unsqueeze(-1).expand_as(i["B"])
    o, S = gated_linear_attention(i["C"], i["B"], i["x"] * i["dt"].unsqueeze(-1), g, i["state"], scale=1.0)
    y, last = ssd(**i | {"D": None})
    assert relative_error(y, o) < 1e-12
    assert relative_error(last, S) < 1e-12
    assert relative_error(ssd(**i)[0], o + i["D"].unsqueeze(-1) * i["x"]) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 16, 64, 128])
def test_the_length_of_chunks_changes_nothing(size: int) -> None:
    i = [x.requires_grad_() for x in SPEC.inputs(2, 75).values()]
    *inputs, state = i
    exact = ssd(*i, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    ours = ssd_chunked(*inputs, state, None, size=size)
    for got, want in zip(
        (*ours, *torch.autograd.grad(ours, i, cotangents)), (*exact, *torch.autograd.grad(exact, i, cotangents)),
        strict=True,
    ):  # fmt: skip
        assert relative_error(got, want) < 1e-12


def test_decays_are_exact_behind_strong_gates() -> None:
    a = torch.full((1, 64), -0.01)
    a[:, ::9] = -300.0
    a[:, 31] = float("-inf")
    exact = torch.zeros(1, 64, 64, dtype=torch.float64)
    for i in range(64):
        for j in range(i + 1):
            exact[0, i, j] = a[0, j + 1 : i + 1].double().sum().exp()
    found = decay.between(decay.sums(a), torch.float32)
    assert ((found - exact).abs() <= 1e-6 * exact + 1e-37).all()  # float32 ends at 1e-38


def test_groups_must_divide_the_heads() -> None:
    i = SPEC.inputs(1, 5)
    with pytest.raises(ValueError, match=r"ssd: the number of heads must be a multiple of the groups .*H = 3, G = 2"):
        ssd(i["x"][:, :, :3], i["dt"][..., :3], i["A"][:3], i["B"], i["C"])


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "N", "P"), [(torch.float32, 35, 34), (torch.float16, 67, 20)], ids=str)
def test_kernels_sum_over_many_heads_and_cut_large_ones(dtype: torch.dtype, N: int, P: int) -> None:
    """More heads in a group than one program sums over; states and heads larger than a block, and not a multiple."""
    given = SPEC.inputs(1, 70, {"H": 9, "P": P, "G": 1, "N": N})
    given |= {"dt": 0.1 * given["dt"], "A": given["A"].clamp_min(-1.0)}  # decays in a chunk from 0.05 to 1, as trained
    assert not red(parity(SPEC, given, backend="triton", dtype=dtype, device=DEVICE), dtype)


@pytest.mark.everything
@pytest.mark.kernels
def test_kernels_without_a_skip_and_through_one_output_alone() -> None:
    given = {name: x.float().to(DEVICE) for name, x in SPEC.inputs(2, 70).items() if name != "D"}
    ours, exact = (outputs_and_gradients(SPEC, given, backend=b) for b in ("triton", "reference"))
    for name, want in exact.items():
        assert relative_error(ours[name], want) < 2e-5, name
    leaves = [x.requires_grad_() for x in given.values()]
    for i in (0, 1):
        found, want = (ssd(**given, backend=b)[i] for b in ("triton", "reference"))
        grads = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (found, want))
        for got, right in zip(*grads, strict=True):
            assert relative_error(got, torch.zeros_like(got) if right is None else right) < 2e-5


@pytest.mark.kernels
def test_kernels_take_steps_wider_than_the_rest() -> None:
    given = {name: x.float().to(DEVICE) for name, x in SPEC.inputs(1, 70).items()}
    half = given | {name: given[name].half() for name in "xBC"}  # the interpreter's products are wrong in bfloat16
    y, S = ssd(**half, backend="triton")
    assert (y.dtype, S.dtype) == (torch.float16, torch.float32)
    leaves = {name: x.clone().requires_grad_() for name, x in half.items()}
    ssd(**leaves, backend="triton")[0].sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in leaves.values())
    exact, _ = ssd(**{name: x.double() for name, x in half.items()})
    assert relative_error(y, exact) < 4e-3


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="ssd: kernels take float32 or narrower; got float64, use backend='torch'"):
        ssd(**SPEC.inputs(1, 5), backend="triton")


@pytest.mark.kernels
def test_kernels_have_no_runs_that_differ() -> None:
    """Sums over heads and chunks have one order: twice the same bits."""
    given = {name: x.float().to(DEVICE) for name, x in SPEC.inputs(1, 130).items()}
    first, second = (outputs_and_gradients(SPEC, given, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
