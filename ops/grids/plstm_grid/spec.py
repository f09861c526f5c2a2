"""What pLSTM on a grid must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_some, randn
from zoo.ops.grids.plstm_grid import plstm_grid

COLUMNS = 2  # where sizes say none


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Transitions of either sign; the paths to a cell neither die at once nor explode."""
    cells = B, T, sizes.get("W", COLUMNS), sizes["H"]
    return {
        "q": randn(generator, *cells, sizes["K"]),
        "k": randn(generator, *cells, sizes["K"]),
        "v": randn(generator, *cells, sizes["V"]),
        "source": torch.sigmoid(randn(generator, *cells, 2)),
        "transition": 0.6 * torch.tanh(2 * randn(generator, *cells, 2, 2)),
        "mark": torch.sigmoid(randn(generator, *cells, 2)),
        "direct": torch.sigmoid(randn(generator, *cells)),
    }


def _constant(inputs: Inputs, *values: float) -> Inputs:
    T = torch.tensor(values, dtype=inputs["transition"].dtype).view(2, 2)
    return inputs | {"transition": inputs["transition"] * 0 + T}


SPECS = (
    OperatorSpec(
        name="plstm_grid",
        function=plstm_grid,
        make=_inputs,
        state=lambda n, sizes, generator: randn(
            generator, n, sizes.get("W", COLUMNS), sizes["H"], sizes["K"], sizes["V"]
        ),
        sizes=({"W": 3, "H": 2, "K": 3, "V": 4}, {"W": 1, "H": 1, "K": 4, "V": 2}),
        time=("q", "k", "v", "source", "transition", "mark", "direct"),
        extremes={
            "forget everything": lambda i: _constant(i, 0, 0, 0, 0),
            "rows alone": lambda i: _constant(i, 1, 0, 0, 0),
            "columns alone": lambda i: _constant(i, 0, 0, 0, 1),
            "nothing is lost": lambda i: _constant(i, 0.5, 0.5, 0.5, 0.5),
            "no turn down": lambda i: _constant(i, 1, 0, 1, 1),
            "closed gates": lambda i: i | {"source": at_some(i["source"], 0.0), "mark": at_some(i["mark"], 0.0)},
        },
        resets=lambda i, where: (
            i
            | {
                "transition": i["transition"] * (1 - _from_above(where, 6)),
                "mark": i["mark"] * (1 - _from_above(where, 5)),
            }
        ),
    ),
)


def _from_above(where: torch.Tensor, dims: int) -> torch.Tensor:
    """1 where the row is marked and the edge that enters, the last dimension, is from above."""
    above = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return where.double().view(*where.shape, *[1] * (dims - 2)) * above
