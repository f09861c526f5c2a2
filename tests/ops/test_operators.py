"""Every operator's proofs, from its one entry in zoo.ops.operators."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.ops import algebra
from zoo.ops.operators import OPERATORS
from zoo.ops.proof import OperatorSpec, convert, outputs_and_gradients, parity, red, relative_error, worse_than_the_loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(spec, sizes, id="-".join([name, *(f"{k}{v}" for k, v in sizes.items())]))
    for name, spec in OPERATORS.items()
    for sizes in spec.sizes
]
SPECS = [pytest.param(spec, id=name) for name, spec in OPERATORS.items()]
PACKABLE = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.packed]
STATEFUL = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.state is not None]
KERNELS = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if "triton" in spec.forms]
KERNEL_CASES = [case for case in CASES if "triton" in case.values[0].forms]
EXTREMES = [pytest.param(spec, edge, id=f"{name}-{edge}") for name, spec in OPERATORS.items() for edge in spec.extremes]
LENGTHS = (1, 15, 16, 63, 64, 65, 200)
PACKED = (0, 1, 17, 17, 81, 100)  # one token; an empty document; more than one chunk; a ragged end
needs_triton = pytest.mark.kernels


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("spec", "sizes"), CASES)
def test_torch_equals_reference_in_float64(spec: OperatorSpec, sizes: dict[str, int], length: int) -> None:
    errors = parity(spec, spec.inputs(2, length, sizes), backend="torch", dtype=torch.float64)
    assert not red(errors, torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in OPERATORS.items() if {"K", "V"} <= {*s.sizes[0]}])
def test_torch_equals_reference_at_every_head_size(spec: OperatorSpec, length: int) -> None:
    for K, V in itertools.product((8, 16, 64, 100, 128), repeat=2):
        inputs = spec.inputs(1, length, {"H": 1, "K": K, "V": V})
        assert not red(parity(spec, inputs, backend="torch", dtype=torch.float64), torch.float64), (K, V)


@pytest.mark.parametrize("spec", SPECS)
def test_torch_equals_reference_in_float32(spec: OperatorSpec) -> None:
    errors = parity(spec, spec.inputs(2, 200), backend="torch", dtype=torch.float32)
    assert not red(errors, torch.float32)


@needs_triton
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("spec", "sizes"), KERNEL_CASES)
def test_kernels_equal_reference(spec: OperatorSpec, sizes: dict[str, int], length: int) -> None:
    errors = parity(spec, spec.inputs(1, length, sizes), backend="triton", dtype=torch.float32, device=DEVICE)
    assert not red(errors, torch.float32)


@needs_triton
@pytest.mark.parametrize("spec", [case for case in KERNELS if case.values[0].packed])
def test_kernels_take_packed_documents(spec: OperatorSpec) -> None:
    inputs, cu = spec.inputs(1, PACKED[-1], documents=len(PACKED) - 1), torch.tensor(PACKED)
    errors = parity(spec, inputs, backend="triton", dtype=torch.float32, device=DEVICE, cu_seqlens=cu)
    assert not red(errors, torch.float32)


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
    assert {op.name().endswith("_bwd") for op in seen.calls} == {True, False}
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
    assert not red(errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", KERNELS)
def test_kernels_run_where_their_tensors_are(spec: OperatorSpec) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    errors = parity(spec, spec.inputs(1, 65), backend="triton", dtype=torch.float32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert not red(errors, torch.float32)


@pytest.mark.parametrize(("spec", "edge"), EXTREMES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_extreme_inputs(spec: OperatorSpec, edge: str, backend: str) -> None:
    if backend not in spec.forms:
        pytest.skip(f"no {backend} form")
    inputs = spec.extremes[edge](spec.inputs(1, 100))
    device = DEVICE if backend == "triton" else "cpu"
    errors = parity(spec, inputs, backend=backend, dtype=torch.float32, device=device)
    assert not red(errors, torch.float32)
    if spec.bounded_by_the_loop:
        loop = parity(spec, inputs, backend="reference", dtype=torch.float32)
        assert not worse_than_the_loop(errors, loop)


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck(spec: OperatorSpec) -> None:
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in spec.inputs(1, 5).items()}

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return spec.run(dict(zip(inputs, args, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("spec", STATEFUL)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_cut_in_time_changes_nothing(spec: OperatorSpec, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 150))
    cut = data.draw(st.integers(0, length))
    inputs = spec.inputs(2, length)
    state = inputs.pop("state")
    first = {name: x[:, :cut] if name in spec.time else x for name, x in inputs.items()}
    second = {name: x[:, cut:] if name in spec.time else x for name, x in inputs.items()}
    y, last = spec.run({**inputs, "state": state})
    y1, middle = spec.run({**first, "state": state})
    y2, end = spec.run({**second, "state": middle})
    assert relative_error(torch.cat([y1, y2], dim=1), y) < 1e-10
    assert relative_error(end, last) < 1e-10


@pytest.mark.parametrize("spec", PACKABLE)
@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 130), min_size=1, max_size=5))
def test_packed_equals_separate(spec: OperatorSpec, cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 130]
    inputs = spec.inputs(1, 130, documents=len(bounds) - 1)
    errors = parity(spec, inputs, backend="torch", dtype=torch.float64, cu_seqlens=torch.tensor(bounds))
    assert not red(errors, torch.float64)


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
    inputs = spec.inputs(2, length)
    state, after = inputs["state"], spec.run(inputs)[1]
    del inputs["state"]
    whole = spec.summary(inputs, None)
    assert relative_error(whole.apply(state), after) < 1e-10
    pieces = []
    for left, right in ((0, first), (first, second), (second, length)):
        piece = {name: x[:, left:right] if name in spec.time else x for name, x in inputs.items()}
        pieces.append(spec.summary(piece, None))
    folded = algebra.fold(pieces)
    for ours, exact in zip(folded, whole, strict=True):
        if isinstance(exact, torch.Tensor):
            assert relative_error(ours, exact) < 1e-10


@pytest.mark.parametrize("spec", STATEFUL)
@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 13, 38, 40), (0, 0, 40), (0, 40, 40)], ids=str)
def test_summaries_end_at_borders(spec: OperatorSpec, cuts: tuple[int, ...]) -> None:
    if spec.summary is None:
        pytest.skip("no summary")
    cu = torch.tensor(cuts)
    inputs = spec.inputs(1, 40, documents=len(cuts) - 1)
    inputs["state"][1:] = 0  # the states that a summary is about enter in front
    after = spec.run(inputs, cu_seqlens=cu)[1][-1:]
    element = spec.summary({name: x for name, x in inputs.items() if name != "state"}, cu)
    assert relative_error(element.apply(inputs["state"][:1]), after) < 1e-10


@pytest.mark.parametrize("spec", STATEFUL)
def test_summaries_are_differentiable(spec: OperatorSpec) -> None:
    """Gradients through a summary are those of the final state."""
    if spec.summary is None:
        pytest.skip("no summary")
    inputs = {name: x.requires_grad_() for name, x in spec.inputs(2, 70).items()}
    names = [name for name in inputs if name != "state"]
    after = spec.run(inputs)[1]
    summed = spec.summary({name: inputs[name] for name in names}, None).apply(inputs["state"])
    upstream = torch.randn(after.shape, generator=torch.Generator().manual_seed(2), dtype=after.dtype)
    leaves = list(inputs.values())
    want = torch.autograd.grad(after, leaves, upstream, materialize_grads=True, allow_unused=True)
    ours = torch.autograd.grad(summed, leaves, upstream, materialize_grads=True, allow_unused=True)
    for name, a, b in zip(inputs, ours, want, strict=True):
        assert relative_error(a, b) < 1e-10, name


@pytest.mark.parametrize("spec", STATEFUL)
def test_a_missing_state_is_zeros(spec: OperatorSpec) -> None:
    inputs = spec.inputs(2, 20)
    zeros = torch.zeros_like(inputs.pop("state"))
    for without, given_zeros in zip(spec.run(inputs), spec.run({**inputs, "state": zeros}), strict=True):
        assert torch.equal(without, given_zeros)


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_keeps_its_dtype(spec: OperatorSpec) -> None:
    errors = parity(spec, spec.inputs(1, 200), backend="torch", dtype=torch.bfloat16)
    assert not red(errors, torch.bfloat16)
    wanted = torch.float32 if spec.wide_output else torch.bfloat16
    assert spec.run(convert(spec.inputs(1, 20), torch.bfloat16), backend="torch")[0].dtype == wanted


@pytest.mark.parametrize("spec", SPECS)
def test_refusals_say_rule_fact_and_remedy(spec: OperatorSpec) -> None:
    inputs = spec.inputs(1, 10)
    name, called = spec.time[0], _called(spec)
    x = inputs[name]
    with pytest.raises(ValueError, match=f"{called}: {name} must be"):
        spec.run({**inputs, name: x[0]})
    with pytest.raises(ValueError, match=rf"{called}: .* must be .*got"):
        spec.run({**inputs, name: x.new_zeros(3, 7, *x.shape[2:-1], 3)})
    with pytest.raises(ValueError, match=rf"{called}: {name} must be a floating tensor; got torch.int64, convert"):
        spec.run({**inputs, name: x.long()})
    with pytest.raises(ValueError, match=rf"{called}: {name} must be a tensor .*; got list"):
        spec.run({**inputs, name: x.tolist()})
    with pytest.raises(ValueError, match=f"{called}: all tensors must be on one device; .*meta"):
        spec.run({**inputs, name: x.to("meta")})
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


def _called(spec: OperatorSpec) -> str:
    """The function's own name, under any functools.partial."""
    return getattr(spec.function, "func", spec.function).__name__
