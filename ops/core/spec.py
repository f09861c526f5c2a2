"""What every operator must prove, stated once: parity, gradients, any cut in time, packing.

One `OperatorSpec` in an operator's `spec.py`, listed in `zoo.ops.core.table`, gives it all of that, in the tests and in
`zoo doctor`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

from zoo.ops.core.algebra import Affine, Element, Tail
from zoo.ops.core.call import CpKind, Operator, operator_of

Sizes = Mapping[str, int]
Inputs = dict[str, Tensor]
State: TypeAlias = "Tensor | tuple[State, ...]"  # tuples may be NamedTuples; dimension 0 is sequences or documents

# Relative error ||ours - exact|| / ||exact|| against the float64 reference, by dtype of the inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# A fast form in float32 may err so many times as much as the loop in float32, or this much: 16 roundings of 2^-24.
LOOP_FACTOR, LOOP_FLOOR = 2.0, 1e-6
FLOOR = 1e-6  # a gradient whose exact norm per element is below this is compared absolutely


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64, as all inputs of a proof are made."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def at_every(x: Tensor, n: int, value: float) -> Tensor:
    """x with `value` at every n-th step of time, dimension 1."""
    step = torch.arange(x.shape[1]).view(-1, *[1] * (x.ndim - 2))
    return torch.where(step % n == n - 1, torch.full_like(x, value), x)


def at_some(x: Tensor, value: float, share: float = 0.1) -> Tensor:
    """x with `value` at a random share of its places."""
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < share
    return torch.where(chosen, torch.full_like(x, value), x)


def zeros(state: State) -> State:
    """A state like this one, all zeros: what a missing state means to most operators."""
    made: State = tree_map_only(Tensor, torch.zeros_like, state)
    return made


@dataclass(frozen=True)
class Tolerance:
    """An operator's own tolerances, with the reason why the common ones do not do.

    Args:
        by_dtype: relative errors in place of those of TOLERANCE; the dtypes that it leaves out keep theirs.
        reason: what amplifies the rounding, and what was measured.

    Raises:
        ValueError: there is no reason.
    """

    by_dtype: Mapping[torch.dtype, float]
    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(
                "Tolerance: a tolerance of an operator's own needs its reason; got none, say what amplifies the "
                "rounding and what was measured"
            )


@dataclass(frozen=True, kw_only=True)
class OperatorSpec:
    """One operator, as the harness sees it.

    Args:
        name: the public name in zoo.ops; a second entry for another use of one function adds a word.
        function: the public function, called by keyword with the inputs, `cu_seqlens` and `backend`.
        make: (batch, length, sizes, generator) -> float64 CPU inputs with time in dimension 1, without the state.
        state: (documents, sizes, generator) -> a float64 initial state: a tensor or a tree of tensors (tuples and
            NamedTuples), each with documents in dimension 0. Integer leaves have no gradient. None for operators that
            carry no state. In `inputs` the leaves are named "state", or by their place as "state.m" and "state[0]".
        empty: any state -> the one of the same shapes that a missing state means. Zeros unless said otherwise; a
            log-sum-exp starts at -inf.
        sizes: the sizes to prove, besides batch and length.
        time: names of the inputs that have time in dimension 1; the others are parameters.
        extremes: name -> (inputs -> inputs) that push one argument to an edge of its range.
        summary: (inputs without the state, cu_seqlens) -> the element of the whole stretch of time, whose `apply` turns
            the state of the first document into the final one of the last; every affine and halo operator has one that
            is not iterated and sees one side only.
        both_sides: outputs need both ends of a sequence, and there is no state; across ranks something comes from both.
        iterated: a nonlinear operator that crosses ranks by an element for each step of its solver; the whole has none.
        packed: the function takes `cu_seqlens`.
        any_rank: it looks along the last dimensions alone, and takes any number of dimensions in front of them.
        wide_output: outputs are float32 at least, whatever the inputs' dtype.
        bounded_by_the_loop: at every extreme, float32 errors are held to those of the float32 loop. False for Fourier
            transforms, whose errors grow with the largest number in the sequence.
        library: () -> the name of an optional package whose kernels "auto" prefers on CUDA, when it works here, or "".
        tolerance: the operator's own, where rounding grows in it; None for the common one of each dtype.
        resets: how a reset inside a sequence is said to the operator: (inputs, (B, T) bool) -> inputs by which the
            state before each marked step is dropped, as if a sequence began there. None where that cannot be said.
    """

    name: str
    function: Callable[..., State]  # an output, or a tuple of it, the state and what else there is
    make: Callable[[int, int, Sizes, torch.Generator], Inputs]
    state: Callable[[int, Sizes, torch.Generator], State] | None
    sizes: tuple[Sizes, ...]
    time: tuple[str, ...]
    extremes: Mapping[str, Callable[[Inputs], Inputs]]
    empty: Callable[..., State] = zeros
    summary: Callable[[Inputs, Tensor | None], Affine | Tail | Element] | None = None
    both_sides: bool = False
    iterated: bool = False
    packed: bool = True
    any_rank: bool = False
    wide_output: bool = False
    bounded_by_the_loop: bool = True
    library: Callable[[], str] = str  # none
    tolerance: Tolerance | None = None
    resets: Callable[[Inputs, Tensor], Inputs] | None = None

    @functools.cached_property
    def operator(self) -> Operator:
        """The value of the operator that `function` is, or that it wraps.

        Raises:
            ValueError: it is no public operator, and no partial or wrapper (`functools.wraps`) of one.
        """
        function: Any = self.function
        while (value := operator_of(function)) is None:
            inner = function.func if isinstance(function, functools.partial) else inspect.unwrap(function, stop=_public)
            if inner is function:
                raise ValueError(
                    f"{self.name}: function must be a public operator, a partial of one or a functools.wraps of one; "
                    f"got {self.function!r}, mark it by @OPERATOR.public()"
                )
            function = inner
        return value

    @property
    def cp_kind(self) -> CpKind:
        """How the operator crosses ranks."""
        return self.operator.cp_kind

    @property
    def forms(self) -> tuple[str, ...]:
        """The backends that the operator has besides the reference."""
        return self.operator.forms

    def inputs(
        self, batch: int, length: int, sizes: Sizes | None = None, *, documents: int | None = None, seed: int = 0
    ) -> Inputs:
        """Random float64 CPU inputs with an initial state, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        sizes = sizes or self.sizes[0]
        made = self.make(batch, length, sizes, generator)
        if self.state is not None:
            made |= named_leaves(self.state(documents or batch, sizes, generator))
        return made

    def run(self, inputs: Inputs, *, backend: str = "auto", cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Call the operator; always a tuple of tensors: the output, the leaves of the state, and what else there is."""
        given: dict[str, Any] = {name: x for name, x in inputs.items() if name not in self.state_names}
        if len(given) < len(inputs):
            given["state"] = self.state_tree(inputs)
        if self.packed:
            given["cu_seqlens"] = cu_seqlens
        out: tuple[Tensor, ...] = tuple(tree_leaves(self.function(**given, backend=backend)))
        return out

    @functools.cached_property
    def _state_layout(self) -> tuple[tuple[str, ...], TreeSpec | None]:
        if self.state is None:
            return (), None
        state = self.state(1, self.sizes[0], torch.Generator())
        return tuple(named_leaves(state)), tree_flatten_with_path(state)[1]

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the state's leaves in `inputs`, in the order in which `run` returns them; () without a state."""
        return self._state_layout[0]

    def state_tree(self, inputs: Inputs) -> State:
        """The state among the inputs, as the function takes it."""
        names, layout = self._state_layout
        assert layout is not None, f"{self.name} has no state"
        state: State = tree_unflatten([inputs[name] for name in names], layout)
        return state

    def without_state(self, inputs: Inputs) -> Inputs:
        """The inputs but for the state."""
        return {name: x for name, x in inputs.items() if name not in self.state_names}

    def states_after(self, outputs: tuple[Tensor, ...]) -> Inputs:
        """The leaves of the state that `run` returned, named as in the inputs."""
        return dict(zip(self.state_names, outputs[1:], strict=False))

    def allowed(self, dtype: torch.dtype) -> float:
        """The relative error that this operator may have in a dtype."""
        own = {} if self.tolerance is None else self.tolerance.by_dtype
        return own.get(dtype, TOLERANCE[dtype])

    def red(self, errors: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
        """The entries over what is allowed."""
        return {name: error for name, error in errors.items() if not error <= self.allowed(dtype)}


def _public(function: Callable[..., object]) -> bool:
    return operator_of(function) is not None


def named_leaves(state: State) -> Inputs:
    """{"state" or "state.field" or "state[i]": leaf}, in the order of the tree."""
    return {"state" + keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}


def is_state(name: str) -> bool:
    """Whether an input of this name is the state or a leaf of it."""
    return name == "state" or name.startswith(("state.", "state["))


def convert(inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The inputs in another dtype and place. Values are rounded to `dtype`; states stay in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device)
        return x.to(dtype).to(device, wide if is_state(name) else dtype)

    return {name: rounded(name, x) for name, x in inputs.items()}


def outputs_and_gradients(
    spec: OperatorSpec, inputs: Inputs, *, backend: str, cu_seqlens: Tensor | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Outputs and the gradients of all floating inputs, for fixed random cotangents on every output."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    outputs = spec.run({**inputs, **leaves}, backend=backend, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(seed)
    floating = [y for y in outputs if y.is_floating_point()]
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in floating]
    gradients = torch.autograd.grad(floating, list(leaves.values()), cotangents, allow_unused=True)
    numbers = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    numbers |= {
        f"d {name}": torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }
    return numbers


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||; NaN and infinity count as infinite. Tiny exact values are compared absolutely."""
    if exact.numel() == 0:
        return 0.0
    ours, exact = ours.to(exact.device).double(), exact.double()
    floor = FLOOR * exact.numel() ** 0.5
    error = ((ours - exact).norm() / exact.norm().clamp_min(floor)).item()
    return error if error == error else float("inf")


def parity(
    spec: OperatorSpec, inputs: Inputs, *, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu",
    cu_seqlens: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of a backend's outputs and gradients against the float64 reference on the same rounded inputs."""
    given = convert(inputs, dtype, device)
    moved = None if cu_seqlens is None else cu_seqlens.to(device)
    ours = outputs_and_gradients(spec, given, backend=backend, cu_seqlens=moved)
    exact_inputs = convert({name: x.cpu() for name, x in given.items()}, torch.float64)
    exact = outputs_and_gradients(spec, exact_inputs, backend="reference", cu_seqlens=cu_seqlens)
    return {name: relative_error(ours[name], exact[name]) for name in exact}


def red(errors: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The entries over the common tolerance of `dtype`; `OperatorSpec.red` knows an operator's own."""
    return {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}


def worse_than_the_loop(errors: Mapping[str, float], loop: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The float32 errors that are beyond those of the float32 loop, each with the loop's."""
    return {
        name: (error, loop[name])
        for name, error in errors.items()
        if not error <= max(LOOP_FACTOR * loop[name], LOOP_FLOOR)
    }
