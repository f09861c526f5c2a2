"""What a nonlinear recurrence must say of itself to be solved in parallel over time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Planes = Sequence[Tensor]  # one tensor (B, T, D) for each number of the state, or for each gate


class Linearised(NamedTuple):
    """A cell at given states: h = f(p) + J (h' - p) for states h' near p.

    value: f, S planes. jacobian: J, S rows of S planes. kept: whatever `pull` wants to see again.
    """

    value: Planes
    jacobian: Sequence[Planes]
    kept: Any


class Cell:
    """A recurrence h_t = f(h_{t-1}, u_t), channel by channel: no channel's state reaches another channel's.

    A subclass gives `value`; Jacobian and gradients are autograd's unless it gives them, too, which is faster.

    Attributes:
        name: for messages.
        states: S, numbers of state per channel, 1 or 2.
        bound: the states of such a cell lie in [-bound, bound] if those before the first step do; None if unknown.
    """

    name: str = "newton_scan"
    states: int = 1
    bound: float | None = None

    def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
        """f: S planes from S planes of states before, one plane a gate, and parameters (D,). Elementwise."""
        raise NotImplementedError

    def linearise(self, p: Planes, u: Planes, w: Planes) -> Linearised:
        """f and its Jacobian at p, without a graph."""
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # a graph of its own, gone at the end
            q = [x.detach().requires_grad_() for x in p]
            value = self.value(q, u, w)
            rows = [
                torch.autograd.grad(y.sum(), q, retain_graph=True, materialize_grads=True)
                if y.requires_grad
                else [torch.zeros_like(x) for x in p]  # the state plays no part
                for y in value
            ]
        return Linearised([y.detach() for y in value], [[x.contiguous() for x in row] for row in rows], None)

    def pull(self, mu: Planes, p: Planes, u: Planes, w: Planes, kept: Any) -> tuple[Planes, Planes]:
        """The gradients of u and w for the gradients `mu` of f at p: planes like u; like w, summed over all steps."""
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            leaves = [x.detach().requires_grad_() for x in (*u, *w)]
            value = self.value(p, leaves[: len(u)], leaves[len(u) :])
            grads = torch.autograd.grad(value, leaves, mu, materialize_grads=True)
        return grads[: len(u)], grads[len(u) :]


def _as_it_is(x: Tensor) -> Tensor:
    return x
