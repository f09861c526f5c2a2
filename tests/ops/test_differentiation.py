"""Derivatives beyond the first backward pass are right, or refused in one sentence."""

import functools
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from zoo.ops import affine_scan
from zoo.ops.core import recompute
from zoo.ops.core.spec import Inputs, OperatorSpec, convert, relative_error
from zoo.ops.core.table import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(spec, form, length, id=f"{name}-{form}-{length}", marks=[pytest.mark.kernels] * (form == "triton"))
    for name, spec in OPERATORS.items()
    for form in spec.forms
    for length in ((1, 6) if form == "torch" else (6,))
]
LINEAR = {"dropout"}  # in its one input: there are no second derivatives to drop
Derivative = Callable[[str], Sequence[Tensor]]


def _given(spec: OperatorSpec, form: str, length: int) -> Inputs:
    if form == "triton":
        return convert(spec.inputs(1, length), torch.float32, DEVICE)
    return spec.inputs(1, length)


def _directions(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]


def _right_or_refused(derivative: Derivative, form: str, refusal: str) -> None:
    exact = derivative("reference")
    assert any(x.abs().sum() > 0 for x in exact) or all(x.numel() == 0 for x in exact)
    try:
        ours = derivative(form)
    except RuntimeError as error:
        said = str(error)
    else:
        for mine, theirs in zip(ours, exact, strict=True):
            assert relative_error(mine, theirs) < (1e-4 if form == "triton" else 1e-10)
        return
    assert re.search(rf"^[\w ]+: {refusal}.*; use backend='reference', ", said), said


@pytest.mark.parametrize(("spec", "form", "length"), CASES)
def test_second_derivatives_under_a_constant_upstream_gradient(spec: OperatorSpec, form: str, length: int) -> None:
    given = _given(spec, form, length)

    def second(backend: str) -> Sequence[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in given.items() if x.is_floating_point()}
        outputs = spec.run({**given, **leaves}, backend=backend)
        asked = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        sums = [y.sum() for y in outputs if y.is_floating_point()]
        first = torch.autograd.grad(sums, list(leaves.values()), **asked)
        along = [(x * v).sum() for x, v in zip(first, _directions(first), strict=True) if x.requires_grad]
        if not along:
            return [torch.zeros_like(x) for x in leaves.values()]
        return torch.autograd.grad(sum(along), list(leaves.values()), allow_unused=True, materialize_grads=True)

    if spec.name in LINEAR:
        assert all(not x.any() for x in second("reference"))
        return
    _right_or_refused(second, form, "has no second derivatives, and create_graph=True asks for them")


@pytest.mark.parametrize("functional", [False, True], ids=["dual", "jvp"])
@pytest.mark.parametrize(("spec", "form", "length"), CASES)
def test_derivatives_in_forward_mode(spec: OperatorSpec, form: str, length: int, functional: bool) -> None:
    given = _given(spec, form, length)
    names = [name for name, x in given.items() if x.is_floating_point()]
    primals = tuple(given[name] for name in names)
    tangents = tuple(_directions(primals))

    def forward(backend: str) -> Sequence[Tensor]:
        def run(*xs: Tensor) -> tuple[Tensor, ...]:
            return spec.run({**given, **dict(zip(names, xs, strict=True))}, backend=backend)

        if functional:
            along: tuple[Tensor, ...] = torch.func.jvp(run, primals, tangents)[1]
            return along
        with forward_ad.dual_level():
            outputs = run(*(forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True)))
            unpacked = [forward_ad.unpack_dual(y) for y in outputs]
            return [torch.zeros_like(y.primal) if y.tangent is None else y.tangent for y in unpacked]

    _right_or_refused(forward, form, "has no derivatives in forward mode, and an argument carries a tangent")


def test_forward_mode_beside_an_operator_is_left_alone() -> None:
    """Dual numbers elsewhere, and none among the operator's arguments."""
    inputs = OPERATORS["affine_scan"].inputs(1, 6)
    plain = affine_scan(**inputs)[0]
    with forward_ad.dual_level():
        assert torch.equal(affine_scan(**inputs)[0], plain)


def test_second_derivatives_through_recomputation_are_refused() -> None:
    inputs = OPERATORS["affine_scan"].inputs(1, 6)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    run = functools.partial(affine_scan, leaves["a"], leaves["b"], backend="reference")
    y = checkpoint(lambda state: run(state)[0], leaves["state"], use_reentrant=False, context_fn=recompute.contexts())
    with pytest.raises(RuntimeError, match=r"no second derivatives.*; call the block without activation checkpointing"):
        torch.autograd.grad(y.sum(), leaves["state"], create_graph=True)
