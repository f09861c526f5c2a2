"""What Newton's method must prove, on cells that bring neither a Jacobian nor gradients."""

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.scans.newton_scan import Cell, newton_scan
from zoo.ops.scans.newton_scan.cell import Planes


class Elman(Cell):
    """h = tanh(w h' + u)."""

    def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
        """The states after the steps: one plane, tanh(w p + u)."""
        return [torch.tanh(torch.addcmul(u[0], w[0], p[0]))]


class Pendulum(Cell):
    """A pendulum in honey, in small steps: angle and speed."""

    states = 2

    def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
        """The states after the steps: planes of angle and speed."""
        speed = 0.7 * p[1] - 0.3 * torch.sin(p[0]) + 0.1 * u[0]
        return [0.8 * p[0] + 0.3 * w[0] * speed, speed]


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {"u": randn(generator, B, T, 1, sizes["D"]), "w": torch.sigmoid(randn(generator, sizes["D"]))}


def _state(n: int, sizes: Sizes, generator: torch.Generator, *, shape: tuple[int, ...]) -> Tensor:
    return randn(generator, n, sizes["D"], *shape)


@wraps(newton_scan)
def _run(u: Tensor, w: Tensor, *, cell: Cell, **options: Any) -> tuple[Tensor, ...]:
    return newton_scan(cell, u, (w,), **options)


SPECS = tuple(
    OperatorSpec(
        name=f"newton_scan, {type(cell).__name__.lower()}",
        function=partial(_run, cell=cell),
        make=_inputs,
        state=partial(_state, shape=shape),
        sizes=({"D": 7},),
        time=("u",),
        extremes={"w-0": lambda i: i | {"w": i["w"] * 0}},
        iterated=True,
    )
    for cell, shape in ((Elman(), ()), (Pendulum(), (2,)))
)
