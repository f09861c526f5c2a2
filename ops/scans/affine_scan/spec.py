"""What the elementwise affine scan must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.scans.affine_scan import affine_scan, affine_scan_summary


def _affine_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    # of either sign, mostly below 1, sometimes above: products neither die at once nor explode
    return {
        "a": torch.tanh(1.5 * randn(generator, B, T, sizes["D"])) * 1.02,
        "b": randn(generator, B, T, sizes["D"]),
    }


SPECS = (
    OperatorSpec(
        name="affine_scan",
        function=affine_scan,
        make=_affine_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["D"]),
        sizes=({"D": 136},),
        time=("a", "b"),
        extremes={
            "a-0": lambda i: i | {"a": i["a"] * 0},
            "a-1": lambda i: i | {"a": i["a"] * 0 + 1},
            "a--1": lambda i: i | {"a": i["a"] * 0 - 1},
            "a-1.5": lambda i: i | {"a": i["a"] * 0 + 1.5, "b": i["b"] * 1e-3},
        },
        summary=lambda i, cu: affine_scan_summary(i["a"], i["b"], cu_seqlens=cu),
        resets=lambda i, where: i | {"a": i["a"].masked_fill(where.unsqueeze(-1), 0)},
    ),
)
