"""What the scan over a grid must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.grids.grid_scan import grid_scan


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Coefficients of either sign; the paths to a cell neither die at once nor explode."""
    shape = B, T, sizes["W"], sizes["D"]
    return {
        "x": randn(generator, *shape),
        "a": 0.6 * torch.tanh(2 * randn(generator, *shape)),
        "b": 0.6 * torch.tanh(2 * randn(generator, *shape)),
    }


SPECS = (
    OperatorSpec(
        name="grid_scan",
        function=grid_scan,
        make=_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["W"], sizes["D"]),
        sizes=({"W": 9, "D": 3}, {"W": 1, "D": 4}),
        time=("x", "a", "b"),
        extremes={
            "rows alone": lambda i: i | {"a": i["a"] * 0},
            "columns alone": lambda i: i | {"b": i["b"] * 0},
            "nothing is lost": lambda i: i | {"a": i["a"] * 0 + 0.5, "b": i["b"] * 0 + 0.5},
        },
        resets=lambda i, where: i | {"a": i["a"].masked_fill(where[..., None, None], 0)},
    ),
)
