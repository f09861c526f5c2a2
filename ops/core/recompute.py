"""Recomputation that leaves the operators over time alone: each runs forward once a step.

Activation checkpointing runs a block a second time in the backward pass. The operator over time is the dear part of it,
and it makes its own intermediate values again in its own backward: running its forward twice buys nothing. Inside

    checkpoint(block, x, use_reentrant=False, context_fn=recompute.contexts())

an operator that is marked by `@no_recompute` builds its graph in the first pass, and of that graph the inputs are taken
out: they come from token-wise layers and are recomputed. What is kept is the output, the state, and what the operator
saves besides its inputs. The recomputation reads the outputs back instead of calling the operator.

torch's selective checkpointing does this for what its dispatcher sees. Most of our forms are autograd functions, which
it does not see; this works for every differentiable function of tensors, a user's own included. Messages between ranks
inside the operator are sent once, too.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from zoo.ops import shard
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.replay import Tape, Within

P = ParamSpec("P")
R = TypeVar("R")


class Keeping(NamedTuple):
    """Where kept tensors lie between the passes: `place` puts one there, `fetch` brings it back."""

    place: Callable[[Tensor], Any]
    fetch: Callable[[Any], Tensor]


HERE = Keeping(lambda x: x, lambda x: x)


class Input(NamedTuple):
    """A saved tensor that is a view of an operator's input: which one, and where in it."""

    which: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # from the input's own
    pairs: bool = False  # a complex view of real pairs
    conjugate: bool = False


class _Call:
    """One call of an operator: its outputs and the graph behind them, without the inputs."""

    def __init__(self, keeping: Keeping):
        self.keeping = keeping
        self.kept: list[Any] = []  # what the graph saved besides inputs, then the outputs; where `place` put them
        self.spec: TreeSpec | None = None  # of the result
        self.differentiable: list[bool] = []  # per output
        self.graph: tuple[list[GradientEdge | None], list[GradientEdge | None]] = [], []  # of outputs, of inputs
        self.strides: list[tuple[int, ...]] = []  # of the inputs
        self.inputs: tuple[Tensor, ...] = ()  # recomputed, while the backward runs

    def run(self, operator: Callable[..., Any], spec: TreeSpec, given: list[Any], wanted: list[bool]) -> list[Tensor]:
        """The outputs, and a graph that does not hold the inputs."""
        inputs = [x for x in given if isinstance(x, Tensor)]
        # The graph holds `pack` and what it names: no tensor of `inputs`, and `seen` is emptied below.
        where = [(x.untyped_storage()._cdata, int(x.storage_offset()), x.dtype) for x in inputs]
        self.strides = [x.stride() for x in inputs]
        seen: list[Tensor] = []

        def pack(x: Tensor) -> Input | int:
            pairs, conjugate = x.is_complex(), x.is_conj()
            view = torch.view_as_real(x.conj() if conjugate else x) if pairs else x
            storage, offset = view.untyped_storage()._cdata, int(view.storage_offset())
            kind = (storage, view.dtype)
            same = [i for i, (other, _, dtype) in enumerate(where) if (other, dtype) == kind and not x.is_neg()]
            if not same:
                seen.append(x.detach())
                return len(seen) - 1
            i = next((i for i in same if where[i][1] == offset), same[0])
            return Input(i, tuple(view.shape), view.stride(), offset - where[i][1], pairs, conjugate)

        with torch.enable_grad(), saved_tensors_hooks(pack, self._unpack):
            leaves = [x.detach() for x in inputs]
            entering = [i for i, needed in enumerate(wanted) if needed]
            if entering:
                root = torch.zeros((), requires_grad=True)
                for i, x in zip(entering, apply(_Entry, root, *(leaves[i] for i in entering)), strict=True):
                    leaves[i] = x
            supply = iter(leaves)
            args, kwargs = tree_unflatten([next(supply) if isinstance(x, Tensor) else x for x in given], spec)
            with _alone():
                flat, self.spec = tree_flatten(operator(*args, **kwargs))
        if not all(isinstance(x, Tensor) for x in flat):
            raise TypeError(
                f"an operator that is not recomputed returns tensors; {operator.__name__} returned {flat!r}"
            )
        self.graph = [_edge(x) for x in flat], [_edge(x) for x in leaves]
        self.differentiable = [edge is not None for edge in self.graph[0]]
        flat = [x.detach() for x in flat]
        places: dict[tuple[Any, ...], Any] = {}  # an output that the graph saved, too, is kept once
        for x in (*seen, *flat):
            key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
            if key not in places:
                places[key] = self.keeping.place(x)
            self.kept.append(places[key])
        seen.clear()
        return flat

    def outputs(self) -> list[Tensor]:
        """Those of the first pass, brought back; as aliases, for autograd marks what it is given."""
        return [self.keeping.fetch(x).detach() for x in self.kept[len(self.kept) - len(self.differentiable) :]]

    def _unpack(self, packed: Input | int) -> Tensor:
        if isinstance(packed, int):
            return self.keeping.fetch(self.kept[packed])
        x, stride = self.inputs[packed.which], self.strides[packed.which]
        if x.stride() != stride:
            raise RuntimeError(
                f"recomputation must lay out an operator's inputs as the first pass did; got strides {x.stride()} "
                f"instead of {stride}: something in the block depends on more than its inputs"
            )
        view = x.as_strided(packed.size, packed.stride, x.storage_offset() + packed.offset)
        if packed.pairs:
            view = torch.view_as_complex(view)
        return view.conj() if packed.conjugate else view

    def gradients(
        self, inputs: tuple[Tensor, ...], given: tuple[Tensor | None, ...], again: bool
    ) -> list[Tensor | None]:
        """The backward of the operator, given its recomputed inputs; `again`: there may be another one."""
        outputs, entries = self.graph
        pairs = [(e, g) for e, g in zip(outputs, given, strict=True) if e is not None and g is not None]
        wanted = [e for e in entries if e is not None]
        if not pairs or not wanted:
            return [None] * len(inputs)
        self.inputs = inputs
        try:
            made = torch.autograd.grad(
                [e for e, _ in pairs], wanted, [g for _, g in pairs], retain_graph=again, allow_unused=True
            )
        finally:
            self.inputs = ()
            if not again:
                self.graph = [], []
        supply = iter(made)
        return [None if e is None else next(supply) for e in entries]


def _edge(x: Tensor) -> GradientEdge | None:
    return get_gradient_edge(x) if x.requires_grad else None


class _Entry(torch.autograd.Function):
    """Where the graph begins: views that are no leaves, for a leaf is held by its graph, and inputs must not be."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients


class _Once(torch.autograd.Function):
    """The operator as one node of the block's graph. It saves its inputs, which checkpointing drops and makes again."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, run: Callable[[list[bool]], list[Tensor]] | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        outputs = call.outputs() if run is None else run(list(ctx.needs_input_grad[2:]))
        constant = [x for x, differentiable in zip(outputs, call.differentiable, strict=True) if not differentiable]
        ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    @staticmethod
    @first_order("runs_once", "call the block without activation checkpointing")
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        return None, None, *ctx.call.gradients(ctx.saved_tensors, given, again)


class _Scope(NamedTuple):
    """Inside a checkpointed block: calls are written down, or read back when it is recomputed."""

    tape: Tape[_Call]
    keeping: Keeping


_SCOPE: Within[_Scope] = Within("zoo_recompute")


def _alone() -> AbstractContextManager[None]:
    """Inside an operator nothing is written down: neither marked operators nor what other ranks send."""
    here = shard.current()
    return _SCOPE.inside(lambda: None, lambda: nullcontext() if here is None else shard.use(here))


def no_recompute(operator: Callable[P, R]) -> Callable[P, R]:
    """Mark an operator over time: recomputation inside `contexts` reads its outputs back instead of calling it.

    The operator takes tensors (None and nested tuples allowed) and what autograd does not see, and returns a tensor or
    a tuple of tensors. Its second derivatives are not to be had there.
    """

    @functools.wraps(operator)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        scope = _SCOPE.get()
        if scope is None:
            return operator(*args, **kwargs)
        given, spec = tree_flatten((args, kwargs))
        inputs = [x for x in given if isinstance(x, Tensor)]
        record = scope.tape.value(lambda: _Call(scope.keeping))
        again = record.spec is not None
        flat = apply(_Once, record, None if again else functools.partial(record.run, operator, spec, given), *inputs)
        assert record.spec is not None
        result: R = tree_unflatten(list(flat), record.spec)
        return result

    call.no_recompute = True  # type: ignore[attr-defined]
    return call


def runs_once(operator: Callable[P, R]) -> Callable[P, R]:
    """The former name of `no_recompute`; it says so once."""
    _say_renamed()
    return no_recompute(operator)


@functools.cache
def _say_renamed() -> None:
    warnings.warn("zoo.ops.runs_once is now called no_recompute; rename it", DeprecationWarning, stacklevel=3)


def contexts(
    keeping: Keeping = HERE,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """A `context_fn` for torch.utils.checkpoint: marked operators inside run once.

    Args:
        keeping: where outputs, states and what operators save besides their inputs lie until the backward pass.

    Under a sequence shard it is `shard.checkpoint_contexts`, too: what recomputed operators receive is read back.
    """

    def make() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        around, own = _SCOPE.get(), list[_Call]()
        first = (Tape() if around is None else around.tape).first_pass(own)
        arrivals = (nullcontext(), nullcontext()) if shard.current() is None else shard.checkpoint_contexts()
        return (
            _SCOPE.inside(lambda: _Scope(first, keeping), lambda: arrivals[0]),
            _SCOPE.inside(lambda: _Scope(Tape.second_pass(own), keeping), lambda: arrivals[1]),
        )

    return make
