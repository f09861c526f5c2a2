"""Every operator's proofs, from its one entry in zoo.ops.core.table."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zoo.ops.core import algebra
from zoo.ops.core.spec import (
    OperatorSpec,
    Tolerance,
    convert,
    named_leaves,
    outputs_and_gradients,
    parity,
    relative_error,
    worse_than_the_loop,
)
from zoo.ops.core.table import OPERATORS as REGISTERED

_file = importlib.util.spec_from_file_location("running_average", Path(__file__).with_name("running_average.py"))
assert _file is not None
assert _file.loader is not None
running_average = importlib.util.module_from_spec(_file)
_file.loader.exec_module(running_average)

OPERATORS = REGISTERED | {running_average.SPEC.name: running_average.SPEC}  # whose state is a tree with an integer leaf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(spec, sizes, id="-".join([name, *(f"{k}{v}" for k, v in sizes.items())]))
    for name, spec in OPERATORS.items()
    for sizes in spec.sizes
]
SPECS = [pytest.param(spec, id=name) for name, spec in OPERATORS.items()]
PACKABLE = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.packed]
RESETTABLE = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.resets is not None]
STATEFUL = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.state is not None]
KERNELS = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if "triton" in spec.forms]
KERNEL_CASES = [case for case in CASES if "triton" in case.values[0].forms]
EXTREMES = [pytest.param(spec, edge, id=f"{name}-{edge}") for name, spec in OPERATORS.items() for edge in spec.extremes]
KERNEL_EXTREMES = [
    pytest.param(spec, edge, id=f"{name}-{edge}", marks=[pytest.mark.everything] if i else [])
    for name, spec in OPERATORS.items()
    for i, edge in enumerate(spec.extremes)
    if "triton" in spec.forms
]
LENGTHS = (1, 15, 16, 63, 64, 65, 200)
EVERY_LENGTH = [pytest.param(n, marks=[] if n in (1, 65) else [pytest.mark.everything]) for n in LENGTHS]
PACKED = (0, 1, 17, 17, 81, 100)  # one token; an empty document; more than one chunk; a ragged end
needs_triton = pytest.mark.kernels


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("spec", "sizes"), CASES)
def test_torch_equals_reference_in_float64(spec: OperatorSpec, sizes: dict[str, int], length: int) -> None:
    errors = parity(spec, spec.inputs(2, length, sizes), backend="torch", dtype=torch.float64)
    assert not spec.red(errors, torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in OPERATORS.items() if {"K", "V"} <= {*s.sizes[0]}])
def test_torch_equals_reference_at_every_head_size(spec: OperatorSpec, length: int) -> None:
    for K, V in itertools.product((8, 16, 64, 100, 128), repeat=2):
        inputs = spec.inputs(1, length, {"H": 1, "K": K, "V": V})
        assert not spec.red(parity(spec, inputs, backend="torch", dtype=torch.float64), torch.float64), (K, V)


@pytest.mark.parametrize("spec", SPECS)
def test_torch_equals_reference_in_float32(spec: OperatorSpec) -> None:
    errors = parity(spec, spec.inputs(2, 200), backend="torch", dtype=torch.float32)
    assert not spec.red(errors, torch.float32)


@needs_triton
@pytest.mark.parametrize("length", EVERY_LENGTH)
@pytest.mark.parametrize(("spec", "sizes"), KERNEL_CASES)
def test_kernels_equal_reference(spec: OperatorSpec, sizes: dict[str, int], length: int) -> None:
    errors = parity(spec, spec.inputs(1, length, sizes), backend="triton", dtype=torch.float32, device=DEVICE)
    assert not spec.red(errors, torch.float32)


@needs_triton
@pytest.mark.parametrize("spec", [case for case in KERNELS if case.values[0].packed])
def test_kernels_take_packed_documents(spec: OperatorSpec) -> None:
    inputs, cu = spec.inputs(1, PACKED[-1], documents=len(PACKED) - 1), torch.tensor(PACKED)
    errors = parity(spec, inputs, backend="triton", dtype=torch.float32, device=DEVICE, cu_seqlens=cu)
    assert not spec.red(errors, torch.float32)


CONTRACTS_SEEN: set[torch._ops.OpOverload] = set()


class CustomOps(TorchDispatchMode):
    """The first call of every zoo:: operator, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[torch._ops.OpOverload, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zoo" and func not in self.calls:
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("spec", KERNELS)
def test_custom_ops_keep_their_contracts(spec: OperatorSpec) -> None:
    """Schema, fake and autograd registration of every custom op that the operator reaches, on real arguments."""
    with CustomOps() as seen:
        outputs_and_gradients(spec, convert(spec.inputs(1, 5), torch.float32, DEVICE), backend="triton")
    assert any(not op.name().endswith("_bwd") for op in seen.calls)
    for op, args in seen.calls.items():
        if op in CONTRACTS_SEEN:  # by another entry of the same operator
            continue
        CONTRACTS_SEEN.add(op)
        differentiable = not op.name().endswith("_bwd")  # no second derivatives
        own = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
        for x in own:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_(differentiable)
        torch.library.opcheck(op, own)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("spec", "sizes"), KERNEL_CASES)
def test_kernels_equal_reference_on_the_device(
    spec: OperatorSpec, sizes: dict[str, int], length: int, dtype: torch.dtype
) -> None:
    errors = parity(spec, spec.inputs(2, length, sizes), backend="triton", dtype=dtype, device="cuda")
    assert not spec.red(errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", KERNELS)
def test_kernels_run_where_their_tensors_are(spec: OperatorSpec) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    errors = parity(spec, spec.inputs(1, 65), backend="triton", dtype=torch.float32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert not spec.red(errors, torch.float32)


@pytest.mark.parametrize(("spec", "edge"), EXTREMES)
def test_extreme_inputs(spec: OperatorSpec, edge: str) -> None:
    inputs = spec.extremes[edge](spec.inputs(1, 100))
    errors = parity(spec, inputs, backend="torch", dtype=torch.float32)
    assert not spec.red(errors, torch.float32)
    if spec.bounded_by_the_loop:
        assert not worse_than_the_loop(errors, parity(spec, inputs, backend="reference", dtype=torch.float32))


@needs_triton
@pytest.mark.parametrize(("spec", "edge"), KERNEL_EXTREMES)
def test_kernels_at_extreme_inputs(spec: OperatorSpec, edge: str) -> None:
    inputs = spec.extremes[edge](spec.inputs(1, 100))
    errors = parity(spec, inputs, backend="triton", dtype=torch.float32, device=DEVICE)
    assert not spec.red(errors, torch.float32)
    if spec.bounded_by_the_loop:
        loop = parity(spec, inputs, backend="reference", dtype=torch.float32)
        assert not worse_than_the_loop(errors, loop)


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck(spec: OperatorSpec) -> None:
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in spec.inputs(1, 5).items()}

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = spec.run(dict(zip(inputs, args, strict=True)), backend="torch")
        return tuple(y for y in outputs if y.is_floating_point())

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("spec", STATEFUL)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_cut_in_time_changes_nothing(spec: OperatorSpec, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 150))
    cut = data.draw(st.integers(0, length))
    inputs = spec.inputs(2, length)
    first = {name: x[:, :cut] if name in spec.time else x for name, x in inputs.items()}
    second = {name: x[:, cut:] if name in spec.time else x for name, x in inputs.items()}
    whole, begun = spec.run(inputs), spec.run(first)
    ended = spec.run(second | spec.states_after(begun))
    assert relative_error(torch.cat([begun[0], ended[0]], dim=1), whole[0]) < 1e-10
    for end, last in zip(ended[1:], whole[1:], strict=True):
        assert relative_error(end, last) < 1e-10


@pytest.mark.parametrize("spec", PACKABLE)
@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 130), min_size=1, max_size=5))
def test_packed_equals_separate(spec: OperatorSpec, cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 130]
    inputs = spec.inputs(1, 130, documents=len(bounds) - 1)
    errors = parity(spec, inputs, backend="torch", dtype=torch.float64, cu_seqlens=torch.tensor(bounds))
    assert not spec.red(errors, torch.float64)


@pytest.mark.parametrize("spec", STATEFUL)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_summaries_say_what_time_does_to_a_state(spec: OperatorSpec, data: st.DataObject) -> None:
    """The element of any stretch turns the state before it into the state after it, and elements compose."""
    if spec.summary is None:
        assert spec.cp_kind not in ("affine", "halo") or spec.iterated
        return
    length = data.draw(st.integers(1, 150))
    first, second = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    given = spec.inputs(2, length)
    state, inputs = spec.state_tree(given), spec.without_state(given)
    whole = spec.summary(inputs, None)
    after = spec.states_after(spec.run(given))
    for name, leaf in named_leaves(whole.apply(state)).items():
        assert relative_error(leaf, after[name]) < 1e-10, name
    pieces = []
    for left, right in ((0, first), (first, second), (second, length)):
        piece = {name: x[:, left:right] if name in spec.time else x for name, x in inputs.items()}
        pieces.append(spec.summary(piece, None))
    folded = algebra.fold(pieces)
    for ours, exact in zip(tree_leaves(folded), tree_leaves(whole), strict=True):
        if isinstance(exact, torch.Tensor):
            assert relative_error(ours, exact) < 1e-10


@pytest.mark.parametrize("spec", STATEFUL)
@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 13, 38, 40), (0, 0, 40), (0, 40, 40)], ids=str)
def test_summaries_end_at_borders(spec: OperatorSpec, cuts: tuple[int, ...]) -> None:
    if spec.summary is None:
        pytest.skip("no summary")
    cu = torch.tensor(cuts)
    inputs = spec.inputs(1, 40, documents=len(cuts) - 1)
    state = spec.state_tree(inputs)
    for leaf, empty in zip(tree_leaves(state), tree_leaves(spec.empty(state)), strict=True):
        leaf[1:] = empty[1:]  # the states that a summary is about enter in front
    after = spec.states_after(spec.run(inputs, cu_seqlens=cu))
    element = spec.summary(spec.without_state(inputs), cu)
    for name, leaf in named_leaves(element.apply(tree_map(lambda x: x[:1], state))).items():
        exact = after[name][-1:]
        assert torch.equal(leaf, exact) or relative_error(leaf, exact) < 1e-10, name  # an empty log-sum-exp is at -inf


@pytest.mark.parametrize("spec", STATEFUL)
def test_summaries_are_differentiable(spec: OperatorSpec) -> None:
    """Gradients through a summary are those of the final state."""
    if spec.summary is None:
        pytest.skip("no summary")
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in spec.inputs(2, 70).items()}
    after = [x for x in spec.states_after(spec.run(inputs)).values() if x.is_floating_point()]
    element = spec.summary(spec.without_state(inputs), None)
    summed = [x for x in tree_leaves(element.apply(spec.state_tree(inputs))) if x.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in after]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    want, ours = (
        torch.autograd.grad(ends, list(leaves.values()), upstream, materialize_grads=True, allow_unused=True)
        for ends in (after, summed)
    )
    for name, a, b in zip(leaves, ours, want, strict=True):
        assert relative_error(a, b) < 1e-10, name


@pytest.mark.parametrize("spec", STATEFUL)
def test_a_missing_state_is_an_empty_one(spec: OperatorSpec) -> None:
    given = spec.inputs(2, 20)
    inputs, empty = spec.without_state(given), named_leaves(spec.empty(spec.state_tree(given)))
    for without, given_empty in zip(spec.run(inputs), spec.run(inputs | empty), strict=True):
        assert torch.equal(without, given_empty)


@pytest.mark.parametrize("spec", RESETTABLE)
@pytest.mark.parametrize("begins", [(0,), (7, 8), (0, 19, 64, 69)], ids=str)
def test_a_reset_begins_a_sequence(spec: OperatorSpec, begins: tuple[int, ...]) -> None:
    """As if the stretches between resets were sequences of their own: outputs, the last state, and all gradients."""
    length = 70
    given = {name: x.requires_grad_(x.is_floating_point()) for name, x in spec.inputs(2, length).items()}
    leaves = [x for x in given.values() if x.requires_grad]
    where = torch.zeros(2, length, dtype=torch.bool).index_fill(1, torch.tensor(begins), True)
    assert spec.resets is not None
    ours = spec.run(spec.resets(spec.without_state(given), where) | named_leaves(spec.state_tree(given)))
    outputs, last = [], {name: given[name] for name in spec.state_names}
    for left, right in itertools.pairwise((0, *begins, length)):
        if left in begins:
            last = named_leaves(spec.empty(spec.state_tree(given)))
        piece = {name: x[:, left:right] if name in spec.time else x for name, x in spec.without_state(given).items()}
        y, *after = spec.run(piece | last)
        outputs.append(y)
        last = dict(zip(spec.state_names, after, strict=True))
    exact = [torch.cat(outputs, dim=1), *last.values()]
    upstream = [like(x, i) for i, x in enumerate(exact)]
    numbers = [
        [*results, *torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)]
        for results in (list(ours), exact)
    ]
    for a, b in zip(*numbers, strict=True):
        assert relative_error(a, b) < 1e-10


def test_a_tolerance_of_an_operators_own_has_a_reason() -> None:
    with pytest.raises(ValueError, match="needs its reason; got none, say what amplifies"):
        Tolerance({torch.float32: 1e-3}, " ")
    spec = running_average.SPEC
    wide = dataclasses.replace(spec, tolerance=Tolerance({torch.float32: 1e-3}, "measured 5e-4 where it is expanding"))
    errors = {"output 0": 5e-4, "d v": 5e-3}
    assert wide.red(errors, torch.float32) == {"d v": 5e-3}
    assert spec.red(errors, torch.float32) == errors
    assert wide.allowed(torch.float64) == spec.allowed(torch.float64)


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_keeps_its_dtype(spec: OperatorSpec) -> None:
    errors = parity(spec, spec.inputs(1, 200), backend="torch", dtype=torch.bfloat16)
    assert not spec.red(errors, torch.bfloat16)
    wanted = torch.float32 if spec.wide_output else torch.bfloat16
    assert spec.run(convert(spec.inputs(1, 20), torch.bfloat16), backend="torch")[0].dtype == wanted


@pytest.mark.parametrize("spec", SPECS)
def test_refusals_say_rule_fact_and_remedy(spec: OperatorSpec) -> None:
    inputs = spec.inputs(1, 10)
    name, called = spec.time[0], _called(spec)
    x = inputs[name]
    if not spec.any_rank:
        with pytest.raises(ValueError, match=f"{called}: {name} must be"):
            spec.run({**inputs, name: x[0]})
    if len(inputs) > 1:  # otherwise there is nothing to disagree with
        with pytest.raises(ValueError, match=rf"{called}: .* must be .*got"):
            spec.run({**inputs, name: x.new_zeros(3, 7, *x.shape[2:-1], 3)})
    with pytest.raises(ValueError, match=rf"{called}: {name} must be a floating tensor; got torch.int64, convert"):
        spec.run({**inputs, name: x.long()})
    with pytest.raises(ValueError, match=rf"{called}: {name} must be a tensor .*; got list"):
        spec.run({**inputs, name: x.tolist()})
    if len(inputs) > 1:
        with pytest.raises(ValueError, match=f"{called}: all tensors must be on one device; .*meta"):
            spec.run({**inputs, name: x.to("meta")})
    if sum(other.is_floating_point() for other in inputs.values()) > 1:
        with pytest.raises(ValueError, match=f"{called}: .* must share one dtype; got .*{name} bfloat16"):
            spec.run({**inputs, name: x.bfloat16()})
    with pytest.raises(ValueError, match=f"{called}: backend must be one of .*got 'cuda'"):
        spec.run(inputs, backend="cuda")


@pytest.mark.parametrize("spec", PACKABLE)
def test_wrong_boundaries_are_refused(spec: OperatorSpec) -> None:
    inputs, called = spec.inputs(1, 10), _called(spec)
    for bad in (torch.tensor([0, 5]), torch.tensor([0, 7, 3, 10]), torch.tensor([[0, 10]]), torch.tensor([0.0, 10.0])):
        with pytest.raises(ValueError, match=f"{called}: cu_seqlens must"):
            spec.run(inputs, cu_seqlens=bad)
    with pytest.raises(ValueError, match=f"{called}: packed sequences have batch size 1"):
        spec.run(spec.inputs(2, 10), cu_seqlens=torch.tensor([0, 10]))


def like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Random numbers in x's shape."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def _called(spec: OperatorSpec) -> str:
    """The function's own name, under any functools.partial."""
    return getattr(spec.function, "func", spec.function).__name__
