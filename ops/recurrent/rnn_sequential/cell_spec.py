"""What all recurrent cells must prove alike; each operator's own `spec.py` makes its entry of it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.recurrent.rnn_sequential.cells import CELLS


def rnn_spec(
    function: Callable[..., Any],
    sizes: tuple[Sizes, ...],
    extremes: Mapping[str, Callable[[Inputs], Inputs]],
    valid: Callable[[Tensor], Tensor] = lambda state: state,
) -> OperatorSpec:
    """The entry of one cell, by the name of its operator.

    Args:
        sizes, extremes: as in OperatorSpec.
        valid: random numbers (n, S, H, D) -> a state that the cell can have.
    """
    cell = CELLS[function.__name__]

    def make(B: int, T: int, sizes: Sizes, generator: Any) -> Inputs:
        H, D = sizes["H"], sizes["D"]
        return {
            "x": randn(generator, B, T, cell.given, H, D),
            "R": randn(generator, cell.recurrent, H, D, D) * 0.8 / D**0.5,  # states of long ago fade
            "b": randn(generator, cell.gates, H, D),
        }

    return OperatorSpec(
        name=cell.name,
        function=function,
        make=make,
        state=lambda n, sizes, generator: valid(randn(generator, n, cell.states, sizes["H"], sizes["D"])),
        sizes=sizes,
        time=("x",),
        extremes=extremes,
    )
