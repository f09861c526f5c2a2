"""What quasiseparable mixing must prove."""

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_some, randn
from zoo.ops.state_spaces.quasiseparable import quasiseparable


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, P, G, N = (sizes[name] for name in "HPGN")
    return {
        "x": randn(generator, B, T, H, P),
        "dt": F.softplus(randn(generator, B, T, 2, H)),
        "A": -(randn(generator, H).abs() + 0.05),
        "B": randn(generator, B, T, 2, G, N),
        "C": randn(generator, B, T, 2, G, N) * N**-0.5,
        "D": randn(generator, B, T, H),
    }


SPECS = (
    OperatorSpec(
        name="quasiseparable",
        function=quasiseparable,
        make=_inputs,
        state=None,
        sizes=(
            {"H": 4, "P": 8, "G": 2, "N": 16},
            {"H": 2, "P": 64, "G": 1, "N": 64},
            {"H": 3, "P": 20, "G": 1, "N": 9},
        ),
        time=("x", "dt", "B", "C", "D"),
        extremes={
            "no step": lambda i: i | {"dt": i["dt"] * 0},
            "forget nothing": lambda i: i | {"A": i["A"] * 0},
            "forget everything": lambda i: i | {"A": i["A"] * 0 - 500},
            "resets among weak gates": lambda i: i | {"dt": at_some(i["dt"] * 0.01, 100.0)},
        },
        both_sides=True,
    ),
)
