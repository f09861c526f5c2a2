"""What the complex affine scan must prove, with transitions per step and with those of a time-invariant system."""

import torch
from torch import Tensor

from zoo.ops.core.pairs import as_pairs
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.scans.complex_affine_scan import complex_affine_scan, complex_affine_scan_summary


def _transitions(generator: torch.Generator, *shape: int) -> Tensor:
    """Any phase, sizes mostly below 1, sometimes above: products neither die at once nor explode."""
    size = torch.tanh(1.5 * randn(generator, *shape).abs()) * 1.02
    return as_pairs(torch.polar(size, 3 * randn(generator, *shape)))


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {"a": _transitions(generator, B, T, sizes["D"]), "b": randn(generator, B, T, sizes["D"], 2)}


def _constant_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    size = 1 - 0.1 * randn(generator, 1, 1, sizes["D"]).abs()
    a = as_pairs(torch.polar(size, 3 * randn(generator, 1, 1, sizes["D"])))
    return {"b": randn(generator, B, T, sizes["D"], 2), "a": a}


def _state(n: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    return randn(generator, n, sizes["D"], 2)


SPECS = (
    OperatorSpec(
        name="complex_affine_scan",
        function=complex_affine_scan,
        make=_inputs,
        state=_state,
        sizes=({"D": 70},),
        time=("a", "b"),
        extremes={
            "a-0": lambda i: i | {"a": i["a"] * 0},
            "a-1": lambda i: i | {"a": i["a"] * 0 + torch.tensor([1.0, 0.0])},
            "a-i": lambda i: i | {"a": i["a"] * 0 + torch.tensor([0.0, 1.0])},
        },
        summary=lambda i, cu: complex_affine_scan_summary(i["a"], i["b"], cu_seqlens=cu),
        resets=lambda i, where: i | {"resets": where},
    ),
    OperatorSpec(
        name="complex_affine_scan constant",
        function=complex_affine_scan,
        make=_constant_inputs,
        state=_state,
        sizes=({"D": 70},),
        time=("b",),
        extremes={"a-i": lambda i: i | {"a": i["a"] * 0 + torch.tensor([0.0, 1.0])}},
        summary=lambda i, cu: complex_affine_scan_summary(i["a"], i["b"], cu_seqlens=cu),
        resets=lambda i, where: i | {"resets": where},
    ),
)
