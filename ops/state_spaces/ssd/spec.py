"""What state space duality must prove."""

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_every, at_some, randn
from zoo.ops.state_spaces.ssd import ssd, ssd_summary


def _ssd_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, P, G, N = (sizes[name] for name in "HPGN")
    return {
        "x": randn(generator, B, T, H, P),
        "dt": F.softplus(randn(generator, B, T, H)),
        "A": -(randn(generator, H).abs() + 0.05),
        "B": randn(generator, B, T, G, N),
        "C": randn(generator, B, T, G, N) * N**-0.5,
        "D": randn(generator, H),
    }


SPECS = (
    OperatorSpec(
        name="ssd",
        function=ssd,
        make=_ssd_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["N"], sizes["P"]),
        sizes=(
            {"H": 4, "P": 8, "G": 2, "N": 16},
            {"H": 1, "P": 64, "G": 1, "N": 128},
            {"H": 3, "P": 20, "G": 1, "N": 9},
        ),
        time=("x", "dt", "B", "C"),
        extremes={
            "no step": lambda i: i | {"dt": i["dt"] * 0},
            "forget nothing": lambda i: i | {"A": i["A"] * 0},
            "forget everything": lambda i: i | {"A": i["A"] * 0 - 500},
            "every second gate shuts": lambda i: i | {"A": i["A"] * 0 - 1, "dt": at_every(i["dt"], 2, 100.0)},
            "every eighth gate is strong": lambda i: i | {"A": i["A"] * 0 - 1, "dt": at_every(i["dt"] * 0.01, 8, 20.0)},
            "resets among weak gates": lambda i: i | {"dt": at_some(i["dt"] * 0.01, 100.0)},
        },
        summary=lambda i, cu: ssd_summary(i["x"], i["dt"], i["A"], i["B"], cu_seqlens=cu),
    ),
)
