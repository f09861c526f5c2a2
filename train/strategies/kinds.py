"""How a model's layers cross ranks, by the operators that they declare."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from zoo.errors import UserError
from zoo.ops.core.call import Choice, Operator, declared, watched
from zoo.ops.shard.torch_modules import looks_along_time

__all__ = ["CONTIGUOUS", "kinds", "refuse_uncuttable", "refuse_undeclared"]

CONTIGUOUS = frozenset({"affine", "reduce", "halo", "serial", "frontier"})  # need one stretch of time in one piece


def kinds(model: nn.Module) -> dict[str, set[str]]:
    """{kind of crossing: the layers that need it}, with the kinds of `Operator.cp_kind`.

    A layer says which operators its own code calls by `operators = (delta_rule, ...)` on its class. A layer without it
    is cut all the same: its operators exchange what they need, and refuse a layout in which they cannot.
    """
    layers: dict[str, set[str]] = {}
    for module in model.modules():
        for operator in declared(module):
            layers.setdefault(operator.cp_kind, set()).add(type(module).__name__)
    return layers


@contextmanager
def refuse_undeclared(model: nn.Module, needed: Iterable[str]) -> Iterator[None]:
    """Inside, raise where the model calls an operator of one of these kinds and no layer declares any.

    Raises:
        UserError: a plan was made without knowing of the operator.
    """
    unknown = frozenset(needed) - set(kinds(model))

    def watch(operator: Operator, choice: Choice, outermost: bool) -> None:
        if outermost and operator.cp_kind in unknown:
            raise UserError(
                f"plans depend on how layers cross ranks, so layers declare their operators; {operator.name} is called "
                f"by a layer that does not, add operators = (zoo.ops.{operator.name},) to its class"
            )

    with watched(watch):
        yield


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
