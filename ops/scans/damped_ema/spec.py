"""What the damped moving average must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_some, randn
from zoo.ops.scans.damped_ema import damped_ema, damped_ema_summary


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    D, N = sizes["D"], sizes["N"]
    return {
        "x": randn(generator, B, T, D),
        "a": torch.sigmoid(1.5 + 2 * randn(generator, D, N)),  # from fast to slow: memories of 1 to 100 steps
        "b": randn(generator, D, N),
        "c": randn(generator, D, N) * N**-0.5,
    }


SPECS = (
    OperatorSpec(
        name="damped_ema",
        function=damped_ema,
        make=_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["D"], sizes["N"]),
        sizes=({"D": 6, "N": 4}, {"D": 3, "N": 16}, {"D": 1, "N": 1}),
        time=("x",),
        extremes={
            "forget everything": lambda i: i | {"a": i["a"] * 0},
            "forget nothing": lambda i: i | {"a": i["a"] * 0 + 1},
            "both at some": lambda i: i | {"a": at_some(at_some(i["a"], 0.0, 0.3), 1.0, 0.2)},
            "nearly nothing": lambda i: i | {"a": 1 - i["a"] * 1e-4},
        },
        summary=lambda i, cu: damped_ema_summary(i["x"], i["a"], i["b"], cu_seqlens=cu),
    ),
)
