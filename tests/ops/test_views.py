"""Inputs may be views: at odd places of their storage, and with gaps between their rows."""

import pytest
import torch
from torch import Tensor

from zoo.ops.core.spec import Inputs, OperatorSpec, convert, outputs_and_gradients, relative_error
from zoo.ops.core.table import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(spec, form, length, id=f"{name}-{form}-{length}", marks=[pytest.mark.kernels] * (form == "triton"))
    for name, spec in OPERATORS.items()
    for form in (*spec.forms, "reference")
    for length in ((1, 70) if form == "torch" else (20,))
]


def _at_an_odd_place(x: Tensor) -> Tensor:
    """The same numbers, contiguous, from the second place of a storage on."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _with_gaps(x: Tensor) -> Tensor:
    """The same numbers in rows that are odd in length, each from its second place on."""
    size = x.shape[-1]
    wide = x.new_zeros(*x.shape[:-1], size + 2 + (size + 1) % 2)
    return wide[..., 1 : 1 + size].copy_(x)


def _time_last(x: Tensor) -> Tensor:
    """The same numbers, laid out with the second dimension last."""
    return x if x.ndim < 3 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _gradients(spec: OperatorSpec, inputs: Inputs, form: str) -> dict[str, Tensor]:
    """As `outputs_and_gradients`, of views: that one clones its leaves."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    outputs = spec.run({**inputs, **leaves}, backend=form)
    generator = torch.Generator().manual_seed(1)
    floating = [y for y in outputs if y.is_floating_point()]
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in floating]
    gradients = torch.autograd.grad(
        floating, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    named = {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | named


@pytest.mark.parametrize("view", [_at_an_odd_place, _with_gaps, _time_last])
@pytest.mark.parametrize(("spec", "form", "length"), CASES)
def test_views_change_nothing(spec: OperatorSpec, form: str, length: int, view: object) -> None:
    assert callable(view)
    given = spec.inputs(2, length)
    if form == "triton":
        given = convert(given, torch.float32, DEVICE)
    views = {name: view(x) for name, x in given.items()}
    plain = outputs_and_gradients(spec, given, backend=form)
    for name, ours in _gradients(spec, views, form).items():
        assert relative_error(ours, plain[name]) < (1e-5 if form == "triton" else 1e-12), name
