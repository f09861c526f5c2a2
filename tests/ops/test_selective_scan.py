"""The selective scan against an implementation that is not ours; chunks, memory, decoding."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.ops import selective_scan, selective_scan_summary
from zoo.ops.core.call import Choice
from zoo.ops.core.spec import outputs_and_gradients, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.state_spaces.selective_scan.chunked import selective_scan_chunked

SPEC = OPERATORS["selective_scan"]
SIZES = {"E": 10, "N": 16}


def inputs(T: int, *, B: int = 2, sizes: dict[str, int] = SIZES, documents: int | None = None) -> dict[str, Tensor]:
    return SPEC.inputs(B, T, sizes, documents=documents)


@pytest.mark.parametrize("T", [1, 37, 130])
def test_agrees_with_transformers(T: int) -> None:
    """Values, final states and gradients of the scan inside transformers' Mamba."""
    theirs = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="transformers is not installed")
    if not hasattr(theirs, "mamba_selective_scan"):
        pytest.skip("this release of transformers has no mamba_selective_scan")
    given = inputs(T)
    del given["state"]
    leaves = {name: x.float().requires_grad_() for name, x in given.items()}
    y, h = selective_scan(**leaves)
    u, delta, A, B, C, D = leaves.values()
    want, last = theirs.mamba_selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, return_last_state=True)
    assert relative_error(y, want.mT) < 1e-5
    assert relative_error(h, last) < 1e-5
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    ours = torch.autograd.grad((y, h), list(leaves.values()), (dy, dh))
    exact = torch.autograd.grad((want.mT, last), list(leaves.values()), (dy, dh))
    for name, got, right in zip(leaves, ours, exact, strict=True):
        assert relative_error(got, right) < 1e-5, name


def test_chunks_and_rows_change_nothing() -> None:
    given = [x.requires_grad_() for x in inputs(45, B=3).values()]
    exact = selective_scan(*given, backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, given, cotangents))
    for chunk in (1, 2, 16, 44, 45):
        for rows in (1, 2, 3):
            ours = selective_scan_chunked(*given, None, chunk=chunk, rows=rows)
            found = (*ours, *torch.autograd.grad(ours, given, cotangents))
            for got, want in zip(found, wanted, strict=True):
                assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("cuts", [(0, 75), (0, 5, 5, 60, 75), (0, 0, 33, 75, 75), (0, 16, 32, 75)])
def test_chunks_of_packed_documents_change_nothing(cuts: tuple[int, ...]) -> None:
    leaves = [x.requires_grad_() for x in inputs(75, B=1, documents=len(cuts) - 1).values()]
    exact = selective_scan(*leaves, cu_seqlens=torch.tensor(cuts), backend="reference")
    cotangents = [torch.randn_like(x) for x in exact]
    wanted = (*exact, *torch.autograd.grad(exact, leaves, cotangents))
    for chunk in (1, 16, 75):
        ours = selective_scan_chunked(*leaves, cuts, chunk=chunk)
        found = (*ours, *torch.autograd.grad(ours, leaves, cotangents))
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 1e-12


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operator returned, counting memory and not views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("B", [1, 4])
def test_states_of_all_steps_never_exist_at_once(B: int) -> None:
    """Nothing is larger than an input or a chunk of states, forward or backward."""
    T, E, N = 300, 64, 16
    leaves = [x.float().requires_grad_() for x in inputs(T, B=B, sizes={"E": E, "N": N}).values()]
    with Largest() as seen:
        y, h = selective_scan(*leaves)
        torch.autograd.grad((y, h), leaves, (torch.ones_like(y), torch.ones_like(h)))
    assert seen.numbers <= max(B * T * E, 65 * B * E * N) < B * T * E * N // 4


def test_a_gradient_through_one_output_alone() -> None:
    given = {name: x.requires_grad_() for name, x in inputs(40).items()}
    for i in (0, 1):
        ours, exact = (selective_scan(**given, backend=b)[i] for b in ("torch", "reference"))
        needed = [x for name, x in given.items() if not (i == 1 and name in "CD")]
        for got, want in zip(
            torch.autograd.grad(ours.sum(), needed), torch.autograd.grad(exact.sum(), needed), strict=True
        ):
            assert relative_error(got, want) < 1e-10


def test_without_a_skip() -> None:
    given = inputs(30)
    with_zeros = selective_scan(**given | {"D": torch.zeros_like(given["D"])})
    without = selective_scan(**given | {"D": None})
    assert torch.equal(without[0], with_zeros[0])
    assert torch.equal(without[1], with_zeros[1])


@pytest.mark.kernels
def test_kernels_without_a_skip() -> None:
    given = {name: x.float() for name, x in inputs(9, B=1, sizes={"E": 3, "N": 2}).items() if name != "D"}
    ours, exact = (outputs_and_gradients(SPEC, given, backend=b) for b in ("triton", "reference"))
    for name, want in exact.items():
        assert relative_error(ours[name], want) < 1e-5, name


def test_decoding_token_by_token_is_the_whole() -> None:
    given = inputs(25)
    y, last = selective_scan(**given)
    h = given.pop("state")
    for t in range(25):
        now = {name: x[:, t : t + 1] if name in SPEC.time else x for name, x in given.items()}
        y_t, h = selective_scan(**now, state=h)
        assert relative_error(y_t, y[:, t : t + 1]) < 1e-12
    assert relative_error(h, last) < 1e-12


def test_constant_steps_are_a_moving_average() -> None:
    # delta and B constant: h is an exponential average of u with decay exp(delta A), as one long filter
    T, delta, A = 60, 0.3, -0.5
    u = torch.randn(1, T, 1, dtype=torch.float64)
    one = torch.ones(1, T, 1, dtype=torch.float64)
    y, _ = selective_scan(u, delta * one, one[0, :1] * A, one, one)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    kernel = torch.exp(delta * A * lag.double()).tril() * delta
    assert relative_error(y[0, :, 0], kernel @ u[0, :, 0]) < 1e-12


def test_strong_decays_are_finite_and_exact_in_float32() -> None:
    given = inputs(100)
    given["delta"] = 40 * given["delta"]  # exp(delta A) from 1e-1 to far below the smallest float32
    rounded = {name: x.float() for name, x in given.items()}
    found = outputs_and_gradients(SPEC, rounded, backend="torch")
    exact = outputs_and_gradients(SPEC, {name: x.double() for name, x in rounded.items()}, backend="reference")
    for name, x in found.items():
        assert x.isfinite().all()
        assert relative_error(x, exact[name]) < 5e-6, name


def test_a_later_token_changes_no_earlier_output() -> None:
    given = inputs(60)
    y, _ = selective_scan(**given)
    for name in SPEC.time:
        given[name][:, 45] += 0.5
    changed, _ = selective_scan(**given)
    assert torch.equal(y[:, :45], changed[:, :45])
    assert not torch.equal(y[:, 45], changed[:, 45])


def test_inputs_and_cotangents_are_left_alone() -> None:
    # B = 1: the rows are views of the arguments
    given = {name: x.requires_grad_() for name, x in inputs(64, B=1).items()}
    before = {name: x.detach().clone() for name, x in given.items()}
    y, h = selective_scan(**given)
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    kept = dy.clone(), dh.clone()
    torch.autograd.grad((y, h), list(given.values()), (dy, dh))
    assert torch.equal(dy, kept[0])
    assert torch.equal(dh, kept[1])
    assert all(torch.equal(given[name], x) for name, x in before.items())


def test_nothing_but_empty_documents() -> None:
    given = inputs(0, B=1, documents=3)
    y, h = selective_scan(**given, cu_seqlens=torch.tensor([0, 0, 0, 0]))
    assert y.shape == given["u"].shape
    assert torch.equal(h, given["state"])


def test_steps_and_rates_may_be_wider_than_the_rest() -> None:
    given = {name: x.float() for name, x in inputs(40).items()}
    half = given | {name: given[name].bfloat16() for name in "uBC"}
    y, h = selective_scan(**half)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(h, selective_scan(**{name: x.float() for name, x in half.items()})[1]) < 1e-6


@pytest.mark.kernels
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        selective_scan(**inputs(4), backend="triton")


def test_no_kernel_is_launched_over_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without a token on a device with kernels: its element changes no state."""
    package = importlib.import_module("zoo.ops.state_spaces.selective_scan")
    kernels = pytest.importorskip("zoo.ops.state_spaces.selective_scan.kernels", reason="Triton is not installed")
    monkeypatch.setattr(package.OPERATOR, "choose", lambda *args, **kwargs: Choice("triton", "the test says so"))
    monkeypatch.setattr(kernels, "selective_fwd", lambda *args: pytest.fail("a kernel over no token"))
    given = inputs(0)
    element = selective_scan_summary(given["u"], given["delta"], given["A"], given["B"])
    assert torch.equal(element.apply(given["state"]), given["state"])
