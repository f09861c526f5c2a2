"""One call of a public operator: what all of them do before their arithmetic begins.

Every operator's file makes one `Operator`, a value that says how it crosses ranks, which forms it has and what its
kernels take, and marks its public function by `@OPERATOR.public()`. Inside that function `OPERATOR.begin(...)` checks
names, shapes and dtypes, reads the boundaries of documents and chooses the form that runs:

    call = OPERATOR.begin({"q": (q, "B T H K"), "v": (v, "B T H V")}, cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "H K V")
    if call.backend == "reference": ...

`Operator.choose` is the only place that decides which form runs. It is one policy: a backend that was asked for by name
runs or is refused; "auto" runs the kernels on CUDA where they take the call, else torch, and on a CUDA device the
caller is told once, with the reason. `watched` shows what was chosen to whoever reports it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, ParamSpec, Protocol, TypeVar, get_args, overload, runtime_checkable

import torch
from torch import Tensor

from zoo.ops.core import check, dispatch
from zoo.ops.core.algebra import Block2x2, ComplexElementwise, Diagonal, Elementwise, Matrix
from zoo.ops.core.one_token import quick
from zoo.ops.core.packing import last_document
from zoo.ops.core.recompute import no_recompute

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", Elementwise, Diagonal, Matrix, Block2x2, ComplexElementwise)

CpKind = Literal["affine", "reduce", "halo", "serial", "frontier", "attention", "local"]
CP_KINDS: tuple[CpKind, ...] = get_args(CpKind)
Arguments = Mapping[str, tuple[Tensor | None, str]]  # name -> (tensor or None, its dimensions as "B T H K")


class Choice(NamedTuple):
    """Which form runs, and why: "triton", "torch", "reference" or the name of an optional package."""

    backend: str
    why: str


class Limit(NamedTuple):
    """What kernels hold on chip: at most `most` numbers of the size that is called `size` in the checks.

    what: the things that have this size, for the sentence, as "keys".
    remedy: what a caller may do besides backend="torch", as "use more heads".
    """

    size: str
    most: int
    what: str
    remedy: str = ""


class Operator:
    """A public operator as a value: what strategies, planners, doctors and mixers know of it.

    Args:
        name: the name of the public function in zoo.ops, which starts every refusal.
        cp_kind: how it crosses ranks, one of CP_KINDS; docs/adding_an_operator.md has the table.
        forms: the backends that it has besides the reference.
        limits: sizes that its kernels are bounded by; a size that a call does not name is not judged.
        float64: whether its kernels compute in float64 where they get it.
        no_kernels: for an operator without a Triton form, why it has none.

    Raises:
        ValueError: an unknown kind.

    `function` is the public function, set by `public`.
    """

    function: Callable[..., object]

    def __init__(
        self,
        name: str,
        *,
        cp_kind: CpKind,
        forms: Sequence[str] = ("torch", "triton"),
        limits: Sequence[Limit] = (),
        float64: bool = False,
        no_kernels: str = "",
    ):
        if cp_kind not in CP_KINDS:
            raise ValueError(f"{name}: cp_kind must be one of {', '.join(CP_KINDS)}; got {cp_kind!r}")
        self.name, self.cp_kind, self.forms = name, cp_kind, tuple(forms)
        self.limits, self.float64, self.no_kernels = tuple(limits), float64, no_kernels

    def __repr__(self) -> str:
        return f"Operator({self.name!r}, cp_kind={self.cp_kind!r})"

    @overload
    def public(
        self, *, recomputed: bool = False, precise: bool = True
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    @overload
    def public(
        self, *, recomputed: bool = False, precise: bool = True, step: Callable[P, R]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def public(
        self, *, recomputed: bool = False, precise: bool = True, step: Callable[P, R] | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Mark the public function: autocast is switched off inside, and activation checkpointing runs it once.

        Args:
            recomputed: recomputation of a block calls the operator again; for those that are cheaper than what they
                would keep.
            precise: False where the operator reads autocast's dtype itself.
            step: takes the same arguments when they are one token of decoding, and is called in the operator's place
                once a call with the same shapes and dtypes went the long way; see `zoo.ops.core.one_token`.
        """

        def mark(function: Callable[P, R]) -> Callable[P, R]:
            inner = _nested(dispatch.keeps_its_precision(function) if precise else function)
            whole = functools.wraps(function)(inner if recomputed else no_recompute(inner))
            entry = whole if step is None else quick(whole, step, _WATCHERS)
            self.function = entry
            _OPERATORS[entry] = self
            return entry

        return mark

    def begin(
        self,
        args: Arguments,
        *,
        alike: Sequence[str] = (),
        known: Mapping[str, int] | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str = "auto",
        instead: Callable[[], Choice | None] | None = None,
        problem: str = "",
        name: str = "",
    ) -> "Call":
        """Check the arguments of a call and choose what runs.

        Args:
            args: all tensors but the state; the first one says dtype, device and, in its first two dimensions, B and T.
            alike: the arguments that must share one dtype.
            known: sizes that are fixed beforehand.
            cu_seqlens: boundaries of packed documents, or None.
            backend: what the caller asks for.
            instead: what "auto" prefers to its own choice, if anything; asked after the checks.
            problem: why the kernels cannot take this call, where its options and not its tensors say so.
            name: of the function, where it is not the operator itself, as its summary.

        Raises:
            ValueError: shapes, dtypes or devices disagree, boundaries are wrong, or the backend cannot run here.
        """
        sizes = check.shapes(name or self.name, args, **(known or {}))
        if alike:
            check.same_dtype(name or self.name, **{key: args[key][0] for key in alike})
        first = next(iter(args))
        x = args[first][0]
        assert x is not None
        cuts = None
        if cu_seqlens is not None:
            cuts = check.boundaries(name or self.name, cu_seqlens, *x.shape[:2])
        decide = self.choose if name else self.decide
        choice = decide(backend, x, sizes, instead=instead, problem=problem, name=name)
        if not x.shape[1]:  # nothing to compute, but the graph must reach every argument: its exchanges have a backward
            choice = choice._replace(backend="torch")
        return Call(
            name or self.name, first, args[first], sizes, cuts, choice, asked=backend, dtype=dispatch.state_dtype(x)
        )  # fmt: skip

    def decide(
        self,
        backend: str,
        x: Tensor,
        sizes: Mapping[str, int],
        *,
        instead: Callable[[], Choice | None] | None = None,
        problem: str = "",
        name: str = "",
    ) -> Choice:
        """`choose` for a call that now runs: whoever watches is told."""
        choice = self.choose(backend, x, sizes, instead=instead, problem=problem, name=name)
        for watch in _WATCHERS:
            watch(self, choice, _DEPTH[0] <= 1)
        return choice

    def choose(
        self,
        backend: str,
        x: Tensor,
        sizes: Mapping[str, int] | None = None,
        *,
        instead: Callable[[], Choice | None] | None = None,
        problem: str = "",
        name: str = "",
    ) -> Choice:
        """Which form runs for tensors like x, and why.

        Args:
            backend: what the caller asks for, one of zoo.ops.core.dispatch.BACKENDS.
            x: a tensor of the call; its device and dtype are judged.
            sizes: the sizes of the call by name, as the limits call them.
            instead: what "auto" prefers to its own choice, if anything.
            problem: why the kernels cannot take the call, beside what tensors and sizes say.
            name: what the sentences begin with, when it is not the operator's name.

        Raises:
            ValueError: an unknown backend, or one that was asked for and cannot take the call.
        """
        name = name or self.name
        remedy = "use backend='torch'"
        if not problem and backend in ("auto", "triton"):
            problem, remedy = self._refusal(x, sizes or {})
        if backend == "triton" and problem:
            raise ValueError(f"{name}: {problem}, {remedy}")
        resolved = dispatch.resolve(name, backend, x)
        if backend != "auto":
            return Choice(resolved, "asked for")
        if instead is not None and (preferred := instead()) is not None:
            return preferred
        if resolved == "torch":
            return Choice(resolved, "Triton is not installed" if dispatch.on_cuda(x) else f"tensors on {x.device.type}")
        if not problem:
            return Choice(resolved, "tensors on cuda")
        if "triton" in self.forms:
            dispatch.say_once(f"{name}: {problem}, so the torch form runs on this CUDA device")
        return Choice("torch", problem)

    def _refusal(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[str, str]:
        """Why the kernels cannot take this call, and the remedy; nothing where they can."""
        if "triton" not in self.forms:
            return f"there is no Triton form, {self.no_kernels}", "use backend='torch'"
        if x.dtype == torch.float64 and not self.float64:
            return "kernels take float32 or narrower; got float64", "use backend='torch' or .float()"
        for limit in self.limits:
            if sizes.get(limit.size, 0) > limit.most:
                rule = f"kernels take {limit.what} of at most {limit.most} numbers; got {limit.size}"
                remedy = f"{limit.remedy} or backend='torch'" if limit.remedy else "use backend='torch'"
                return f"{rule} = {sizes[limit.size]}", remedy
        return "", ""


class Call:
    """The checked beginning of one call.

    name: of the function that was called.
    batch, length: B and T, the first two sizes of the first argument.
    sizes: every dimension's size by its name.
    cuts: boundaries of packed documents as ints, or None for a batch.
    documents: rows of a state: the packed documents, or B.
    several: whether documents besides those of the batch lie in the row.
    backend, why: the form that runs, see `Operator.choose`; torch where T = 0.
    asked: the backend that the caller asked for.
    dtype: of states: float32, and float64 for float64 inputs.
    """

    __slots__ = (
        "_first", "_name", "asked", "backend", "batch", "cuts", "documents", "dtype", "length", "name", "several",
        "sizes", "why",
    )  # fmt: skip

    def __init__(
        self, name: str, first: str, given: tuple[Tensor | None, str], sizes: dict[str, int],
        cuts: tuple[int, ...] | None, choice: Choice, *, asked: str, dtype: torch.dtype,
    ):  # fmt: skip
        self.name, self.sizes, self.cuts = name, sizes, cuts
        self.backend, self.why = choice
        self.asked, self.dtype = asked, dtype
        self._name, self._first, (x, _) = first, given, given
        assert x is not None
        self.batch, self.length = x.shape[:2]
        self.documents = self.batch if cuts is None else len(cuts) - 1
        self.several = self.documents > self.batch

    @property
    def one_token(self) -> bool:
        """One token of every row, and nobody asked for a form by name that does it in another way."""
        return self.length == 1 and self.cuts is None and self.asked in ("auto", "torch")

    def state(self, given: Tensor | None, dims: str, *, dtype: torch.dtype | None = None, **known: int) -> Tensor:
        """The state before the first token: what was given, checked and in the dtype of states, or zeros.

        Args:
            given: one row for every document, or None.
            dims: its dimensions behind the rows, as "H K V", by the names of `sizes`.
            dtype: of the state, where it is not `self.dtype`.
            known: sizes that no argument has.

        Raises:
            ValueError: its shape or device is off.
        """
        dtype = dtype or self.dtype
        x = self._first[0]
        assert x is not None
        if given is None:
            sizes = {**self.sizes, **known}
            return torch.zeros(self.documents, *(sizes[dim] for dim in dims.split()), dtype=dtype, device=x.device)
        args = {"state": (given, f"n {dims}"), self._name: self._first}
        check.shapes(self.name, args, **{**self.sizes, **known, "n": self.documents})
        return given.to(dtype)

    def resets(self, given: Tensor | None) -> Tensor | None:
        """The mask of steps where a new episode begins, (B, T) bool, or None.

        Raises:
            ValueError: it is another tensor.
        """
        wanted = self.batch, self.length
        if given is not None and (not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != wanted):
            got = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{self.name}: resets must be a bool tensor (B, T) = {wanted}; got {got}")
        return given

    def last_document(self, *inputs: Tensor | None) -> list[Tensor]:
        """The slices of the last document, the one that goes on after this stretch of time; a batch as it is."""
        return last_document(self.cuts, *inputs)

    def bordered(self, element: E) -> E:
        """The element of the whole stretch from that of its last document: a border between them forgets everything."""
        return element if self.cuts is None or len(self.cuts) == 2 else element.reset_to(element.b)


# -- who calls what ----------------------------------------------------------------------------------------------------

Watch = Callable[[Operator, Choice, bool], None]  # (operator, what runs, whether no other operator called it)

_OPERATORS: dict[Callable[..., object], Operator] = {}  # by public function
_WATCHERS: list[Watch] = []
_DEPTH = [0]  # operators that are running, one inside the other; counted while somebody watches


def operator_of(function: Callable[..., object]) -> Operator | None:
    """The operator that a public function is, or None for any other function."""
    return _OPERATORS.get(function)


Operators = tuple[Callable[..., object] | Operator, ...]


@runtime_checkable
class DeclaresOperators(Protocol):
    """A module that names the operators which its own code calls, by their public functions or as values.

    Modules inside it name their own.
    """

    operators: Operators


def declared(module: object) -> tuple[Operator, ...]:
    """The operators that a module's own code calls, as it declares them; none without a declaration.

    Raises:
        ValueError: it names something that is no operator.
    """
    if not isinstance(module, DeclaresOperators):
        return ()
    return tuple(_value(each, type(module).__name__) for each in module.operators)


def _value(each: Callable[..., object] | Operator, owner: str) -> Operator:
    operator = each if isinstance(each, Operator) else operator_of(each)
    if operator is None:
        raise ValueError(
            f"{owner}.operators must name public operators of zoo.ops or values of zoo.ops.core.call.Operator; "
            f"got {each!r}"
        )
    return operator


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside, `watch(operator, choice, outermost)` is called at the beginning of every operator; it may raise."""
    _WATCHERS.append(watch)
    try:
        yield
    finally:
        _WATCHERS.remove(watch)


def _nested(function: Callable[P, R]) -> Callable[P, R]:
    """Count how deep operators call one another, while somebody watches."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _WATCHERS:
            return function(*args, **kwargs)
        _DEPTH[0] += 1
        try:
            return function(*args, **kwargs)
        finally:
            _DEPTH[0] -= 1

    return run
