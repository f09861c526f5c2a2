"""What the selective scan must prove."""

import torch
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.state_spaces.selective_scan import selective_scan, selective_scan_summary


def _selective_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    E, N = sizes["E"], sizes["N"]
    return {
        "u": randn(generator, B, T, E),
        "delta": F.softplus(randn(generator, B, T, E) - 2),
        "A": -torch.arange(1.0, N + 1, dtype=torch.float64) * torch.exp(0.3 * randn(generator, E, N)),
        "B": randn(generator, B, T, N),
        "C": randn(generator, B, T, N),
        "D": randn(generator, E),
    }


SPECS = (
    OperatorSpec(
        name="selective_scan",
        function=selective_scan,
        make=_selective_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["E"], sizes["N"]),
        sizes=({"E": 6, "N": 3},),
        time=("u", "delta", "B", "C"),
        extremes={
            "delta-0": lambda i: i | {"delta": i["delta"] * 0},
            "delta huge": lambda i: i | {"delta": i["delta"] * 0 + 1000.0, "u": i["u"] * 1e-3},
            "delta 0, tiny or huge": lambda i: (
                i | {"delta": 300.0 * (i["delta"] > 0.3).to(i["delta"]) + 1e-6 * (i["delta"] < 0.1)}
            ),
        },
        summary=lambda i, cu: selective_scan_summary(i["u"], i["delta"], i["A"], i["B"], cu_seqlens=cu),
    ),
)
