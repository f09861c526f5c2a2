"""How a model's layers cross ranks, read off the operators that their code calls."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from zoo import ops
from zoo.errors import UserError
from zoo.ops.core.table import OPERATORS
from zoo.ops.shard.torch_modules import looks_along_time

__all__ = ["CONTIGUOUS", "kinds", "refuse_uncuttable"]

CONTIGUOUS = frozenset({"affine", "reduce", "halo", "serial", "frontier"})  # need one stretch of time in one piece
# by the public function, which a spec may call through one of its own; a spec's name may add a word to it
_KINDS = {
    function: spec.cp_kind
    for spec in OPERATORS.values()
    for function in (spec.function, getattr(ops, spec.name.replace(",", " ").split()[0], spec.function))
}


def kinds(model: nn.Module) -> dict[str, set[str]]:
    """{kind of crossing: the layers that need it}, with the kinds of `OperatorSpec.cp_kind`.

    A layer names its operators nowhere but in its code: the methods of its class, and functions beside it that they
    call, are searched for public operators. What is called in a roundabout way is not seen; an operator that cannot be
    cut says so itself when it runs.
    """
    found: dict[str, set[str]] = {}
    for owner in {type(module) for module in model.modules()}:
        for kind in _of_class(owner):
            found.setdefault(kind, set()).add(owner.__name__)
    return found


def _of_class(owner: type) -> set[str]:
    found: set[str] = set()
    for base in owner.__mro__:
        if base.__module__.split(".")[0] != "torch":
            for value in vars(base).values():
                inner = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
                if isinstance(inner, types.FunctionType):
                    found |= set(_of_function(inner, set()))
    return found


def _of_function(function: types.FunctionType, seen: set[Any]) -> Iterator[str]:
    """The kinds of the operators that a function names, and functions of its own module that it names."""
    if function in seen:
        return
    seen.add(function)
    names = set(_names(function.__code__))
    space = function.__globals__
    for name in names & set(space):
        value = space[name]
        if isinstance(value, types.ModuleType) and value.__name__.split(".")[:2] == ["zoo", "ops"]:
            named = [vars(value)[n] for n in names & set(vars(value))]
        else:
            named = [value]
        for each in named:
            if isinstance(each, types.FunctionType):
                if each in _KINDS:
                    yield _KINDS[each]
                elif each.__module__ == function.__module__:
                    yield from _of_function(inspect.unwrap(each), seen)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def refuse_uncuttable(model: nn.Module, layout: str) -> None:
    """Raise when a model's time cannot be cut at all, or not in this layout.

    Raises:
        UserError: it has a layer of torch's own along time, or has states and the layout is not
            contiguous.
    """
    for name, module in model.named_modules():
        if looks_along_time(module):
            raise UserError(
                f"{name or 'the model'} ({type(module).__name__}) goes along time and cannot go on from another rank's "
                "stretch; build it from zoo.ops or use a strategy without context parallelism, such as ddp"
            )
    if layout != "contiguous":
        layers = {layer for kind, owners in kinds(model).items() if kind in CONTIGUOUS for layer in owners}
        if layers:
            raise UserError(
                f"{', '.join(sorted(layers))} need every rank to hold one contiguous stretch of time; got the {layout} "
                "layout, use a contiguous attention method such as lightseq or ulysses"
            )
