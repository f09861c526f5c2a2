"""The elements of the algebra: one set of properties for all kinds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.ops.core import algebra
from zoo.ops.core.algebra import Block2x2, ComplexElementwise, Diagonal, Elementwise, LogSumExp, Matrix, Tail

Make = Callable[[torch.Generator], Any]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decay(generator: torch.Generator, *shape: int) -> Tensor:
    """Log decays: mostly mild, some that forget everything."""
    chance = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (-chance).masked_fill(chance > 0.9, float("-inf"))


def score(generator: torch.Generator) -> LogSumExp:
    """One key; every fourth is masked, the others spread so widely that a wrong maximum overflows."""
    s = 400 * randn(generator, 2, 3)
    s = s.masked_fill(torch.rand(2, 3, generator=generator) < 0.25, float("-inf"))
    return LogSumExp.of(randn(generator, 2, 3, 4), s)


# kind -> (one step of time, a state)
KINDS: dict[str, tuple[Make, Make]] = {
    "elementwise": (lambda r: Elementwise(decay(r, 2, 3).exp(), randn(r, 2, 3)), lambda r: randn(r, 2, 3)),
    "diagonal": (lambda r: Diagonal(decay(r, 2, 3), randn(r, 2, 3, 4)), lambda r: randn(r, 2, 3, 4)),
    "matrix": (lambda r: Matrix(randn(r, 2, 3, 3) / 2, randn(r, 2, 3, 4)), lambda r: randn(r, 2, 3, 4)),
    "block": (lambda r: Block2x2(randn(r, 3, 2, 2) / 2, randn(r, 3, 2)), lambda r: randn(r, 3, 2)),
    "complex": (lambda r: ComplexElementwise(randn(r, 2, 3, 2), randn(r, 2, 3, 2)), lambda r: randn(r, 2, 3, 2)),
    "log-sum-exp": (score, score),
    "tail": (lambda r: Tail(randn(r, 2, 1, 3), 4), lambda r: randn(r, 2, 4, 3)),
}
AFFINE = ("elementwise", "diagonal", "matrix", "block", "complex")


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [part for part in value if isinstance(part, Tensor)]


def assert_same(ours: Any, want: Any) -> None:
    for a, b in zip(tensors(ours), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def group(elements: list[Any], data: st.DataObject) -> Any:
    """Compose in an order of the drawing's choice, keeping the order of time."""
    elements = list(elements)
    while len(elements) > 1:
        i = data.draw(st.integers(0, len(elements) - 2))
        elements[i : i + 2] = [algebra.compose(elements[i], elements[i + 1])]
    return elements[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 8), seed=st.integers(0, 2**31), data=st.data())
def test_any_grouping_equals_the_loop(kind: str, length: int, seed: int, data: st.DataObject) -> None:
    step, initial = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    steps, state = [step(generator) for _ in range(length)], initial(generator)
    looped = state
    for element in steps:
        looped = element.apply(looped)
    grouped = group(steps, data)
    assert_same(grouped.apply(state), looped)
    assert_same(grouped, algebra.fold(steps))


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_changes_nothing(kind: str) -> None:
    step, initial = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    element, state = step(generator), initial(generator)
    identity = type(element).identity(state.w if isinstance(state, LogSumExp) else state)
    assert_same(algebra.compose(identity, element), element)
    assert_same(algebra.compose(element, identity), element)
    assert_same(identity.apply(state), state)


@pytest.mark.parametrize("kind", AFFINE)
def test_a_transposed_element_is_the_gradient(kind: str) -> None:
    step, initial = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    element, state, upstream = step(generator), initial(generator).requires_grad_(), initial(generator)
    want = torch.autograd.grad(element.apply(state), state, upstream)[0]
    assert_same(element.transposed(torch.zeros_like(want)).apply(upstream), want)


@pytest.mark.parametrize("kind", [*AFFINE, "tail"])
def test_a_reset_forgets_what_arrives(kind: str) -> None:
    step, initial = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    element, value = step(generator), initial(generator)
    assert_same(element.reset_to(value).apply(initial(generator)), value)


def test_log_sum_exp_is_a_softmax_with_finite_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (400 * randn(generator, 3, 6)).masked_fill(torch.eye(3, 6) > 0, float("-inf"))
    scores[2] = float("-inf")  # a query that sees no key
    scores.requires_grad_()
    values = randn(generator, 6, 5).requires_grad_()
    parts = [LogSumExp.of(values[j].expand(3, 5), scores[:, j]) for j in range(6)]
    output, log_sum = algebra.fold(parts).output()
    torch.testing.assert_close(output[:2], scores[:2].softmax(-1) @ values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), rtol=1e-10, atol=1e-10)
    assert torch.equal(output[2], torch.zeros(5, dtype=torch.float64))
    gradients = torch.autograd.grad(output.sum() + log_sum[:2].sum(), (scores, values))
    want = torch.autograd.grad((scores[:2].softmax(-1) @ values).sum() + scores[:2].logsumexp(-1).sum(), scores)[0]
    torch.testing.assert_close(gradients[0][:2], want[:2], rtol=1e-9, atol=1e-9)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_columns_act_each_on_its_part(kind: str, n: int) -> None:
    step, initial = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    element, state = step(generator), initial(generator)
    parts = element.columns(n)
    assert len(parts) == n
    states = state.split([part.b.shape[element.axis] for part in parts], dim=element.axis)
    joined = torch.cat([part.apply(x) for part, x in zip(parts, states, strict=True)], dim=element.axis)
    assert_same(joined, element.apply(state))
