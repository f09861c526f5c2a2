"""Operators that run once a step: the same numbers, one call, and only what is not recomputed in memory."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, noop_context_fn

from zoo.ops import no_recompute, runs_once
from zoo.ops.core import recompute
from zoo.ops.core.recompute import Keeping, contexts
from zoo.ops.core.spec import OperatorSpec
from zoo.ops.core.table import OPERATORS

B, T, D = 2, 12, 6


class Sum(nn.Module):
    """y = W_o (running sum of (W x)^2, W x): an operator that saves an input, and a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.calls = 0

        @no_recompute
        def operator(q: Tensor, k: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            self.calls += 1
            k = (k * k).sigmoid()
            memory = k.cumsum(1) if state is None else k.cumsum(1) + state[:, None]
            return q.transpose(1, 2).sin().transpose(1, 2) * memory, memory[:, -1], torch.arange(3)

        self.operator = operator

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = self.into(x).split(D, dim=-1)
        y, state, numbers = self.operator(q, k, state)
        assert torch.equal(numbers, torch.arange(3))
        return self.out(nn.functional.dropout(y, 0.5)), state


def gradients(module: nn.Module, x: Tensor, state: Tensor, **options: object) -> list[Tensor]:
    torch.manual_seed(3)
    y, after = checkpoint(module, x, state, use_reentrant=False, **options) if options else module(x, state)
    loss = y.square().sum() + after.sin().sum()
    return [y, after, *torch.autograd.grad(loss, [x, state, *module.parameters()])]


@pytest.fixture
def inputs() -> tuple[Sum, Tensor, Tensor]:
    torch.manual_seed(0)
    return Sum().double(), *(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((B, T, D), (B, D)))


def test_gradients_are_those_of_the_plain_call(inputs: tuple[Sum, Tensor, Tensor]) -> None:
    module = inputs[0]
    plain = gradients(*inputs)
    assert module.calls == 1
    for got, want in zip(gradients(*inputs, context_fn=contexts()), plain, strict=True):
        assert torch.equal(got, want)
    assert module.calls == 2  # once more, where recomputation alone would make it two
    gradients(*inputs, preserve_rng_state=True)
    assert module.calls == 4


def test_kept_tensors_can_lie_elsewhere(inputs: tuple[Sum, Tensor, Tensor]) -> None:
    stored: list[Tensor] = []

    def place(x: Tensor) -> int:
        stored.append(x.clone())
        return len(stored) - 1

    plain, kept = gradients(*inputs), gradients(*inputs, context_fn=contexts(Keeping(place, stored.__getitem__)))
    for got, want in zip(kept, plain, strict=True):
        assert torch.equal(got, want)
    # k * k is made inside and kept, q and k are recomputed; then the outputs
    assert all(not torch.equal(x, y) for x in stored for y in inputs[0].into(inputs[1]).split(D, dim=-1))


def test_the_backward_may_be_repeated(inputs: tuple[Sum, Tensor, Tensor]) -> None:
    module, x, state = inputs
    y, _ = checkpoint(module, x, state, use_reentrant=False, context_fn=contexts())
    first = torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert_close(first, second, rtol=0, atol=0)
    assert module.calls == 1


def test_an_input_that_an_output_does_not_depend_on(inputs: tuple[Sum, Tensor, Tensor]) -> None:
    """The last state does not hang on q: a loss of it alone has no gradient there, and the other ones are right."""
    module, x, state = inputs
    wanted = [x, state, module.into.weight]
    exact = torch.autograd.grad(module(x, state)[1].sin().sum(), wanted)
    _, after = checkpoint(module, x, state, use_reentrant=False, context_fn=contexts())
    for got, want in zip(torch.autograd.grad(after.sin().sum(), wanted), exact, strict=True):
        assert torch.equal(got, want)


def test_a_block_inside_a_block_runs_its_operator_once(inputs: tuple[Sum, Tensor, Tensor]) -> None:
    """The inner block's first pass is run again by the outer one, and reads what the first of all made."""
    module, x, state = inputs
    plain = gradients(module, x, state)
    calls = module.calls

    def outer(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(module, x * 1.0, state * 1.0, use_reentrant=False, context_fn=contexts())

    torch.manual_seed(3)
    y, after = checkpoint(outer, x, state, use_reentrant=False, context_fn=contexts())
    loss = y.square().sum() + after.sin().sum()
    nested = [y, after, *torch.autograd.grad(loss, [x, state, *module.parameters()])]
    assert module.calls == calls + 1
    for got, want in zip(nested, plain, strict=True):
        assert torch.equal(got, want)


def test_a_result_that_is_no_tensor_is_refused() -> None:
    operator = no_recompute(lambda x: (x, 3))
    x = torch.ones(2, requires_grad=True)
    assert operator(x)[1] == 3
    with pytest.raises(TypeError, match="returns tensors"):
        checkpoint(lambda x: operator(x)[0], x, use_reentrant=False, context_fn=contexts())


def test_the_former_name_works_and_says_so_once() -> None:
    recompute._say_renamed.cache_clear()
    with pytest.warns(DeprecationWarning, match="runs_once is now called no_recompute; rename it") as said:
        first, second = runs_once(torch.sin), runs_once(torch.cos)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert torch.equal(first(torch.ones(2)), torch.ones(2).sin())
    assert first.no_recompute
    assert second.no_recompute


OVER_TIME = [spec for spec in OPERATORS.values() if spec.cp_kind not in ("local", "halo")]


@pytest.mark.parametrize("spec", OVER_TIME, ids=lambda spec: spec.name)
def test_every_operator_over_time_runs_once(spec: OperatorSpec) -> None:
    """Values and gradients bit by bit those of the plain call. A convolution is cheaper than what it would keep."""
    assert hasattr(getattr(spec.function, "func", spec.function), "no_recompute"), f"{spec.name}: add @no_recompute"
    given = spec.inputs(2, 70)
    names = [name for name, x in given.items() if x.is_floating_point()]

    def block(*leaves: Tensor) -> tuple[Tensor, ...]:  # operators get what is recomputed, as in a model
        made = {name: (x * 1.0 if name in spec.time else x) for name, x in zip(names, leaves, strict=True)}
        return spec.run({**given, **made}, backend="torch")

    results = []
    for once in (False, True):
        leaves = [given[name].clone().requires_grad_() for name in names]
        outputs = checkpoint(block, *leaves, use_reentrant=False, context_fn=contexts()) if once else block(*leaves)
        loss = torch.stack([x.sin().sum() for x in outputs if x.requires_grad]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for got, want in zip(*reversed(results), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


@pytest.mark.kernels
@pytest.mark.parametrize("spec", OPERATORS.values(), ids=lambda spec: spec.name)
def test_kernels_can_be_recomputed(spec: OperatorSpec) -> None:
    """On the meta device, where their fakes run: their backward reads what was saved once, as checkpointing demands."""
    if "triton" not in spec.forms:
        pytest.skip("has no kernels")
    given = {name: x.float() if x.is_floating_point() else x for name, x in spec.inputs(1, 70).items()}
    names = [name for name, x in given.items() if x.is_floating_point()]

    def block(*leaves: Tensor) -> Tensor:
        made = {name: x * 1.0 for name, x in zip(names, leaves, strict=True)}
        return spec.run({**{k: v.to("meta") for k, v in given.items()}, **made}, backend="triton")[0]

    for context_fn in (noop_context_fn, contexts()):
        leaves = [given[name].to("meta").requires_grad_() for name in names]
        y = checkpoint(block, *leaves, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
        found = torch.autograd.grad(y, leaves, torch.empty_like(y), allow_unused=True)
        assert [x.shape for x in found if x is not None]
