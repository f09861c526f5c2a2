"""The GRU with a diagonal recurrent matrix: its value, its Jacobian and its gradients, in as few passes as may be."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.scans.newton_scan.cell import Cell, Linearised, Planes


class ParaGRUCell(Cell):
    """z = sigmoid(a_z h' + u_z), r = sigmoid(a_r h' + u_r), c = tanh(a_c r h' + u_c), h = h' + z (c - h')."""

    name = "para_gru"
    states = 1
    bound = 1.0

    def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
        """The states after the steps, one plane like p[0], which holds the states before them."""
        z, _, c = _gates(p[0], u, w)
        return [torch.lerp(p[0], c, z)]

    def linearise(self, p: Planes, u: Planes, w: Planes) -> Linearised:
        """The value, its elementwise Jacobian by h', and what `pull` needs of the gates."""
        (h,), (a_z, a_r, a_c) = p, w
        z, r, c = _gates(h, u, w)
        value = torch.lerp(h, c, z)
        # derivatives of the value by u_z, u_c and u_r
        by_z = torch.addcmul(z, z, z, value=-1).mul_(c.sub(h))
        by_c = torch.mul(c, c).neg_().add_(1).mul_(z)
        gate = torch.addcmul(r, r, r, value=-1).mul_(h)  # r (1 - r) h
        by_r = torch.mul(by_c, a_c).mul_(gate)
        # J = 1 - z + by_z a_z + by_r a_r + by_c a_c r
        jacobian = z.neg_().add_(1).addcmul_(by_z, a_z).addcmul_(by_r, a_r).add_(torch.mul(by_c, a_c).mul_(r))
        return Linearised([value], [[jacobian]], (by_z, by_r, by_c, r))

    def pull(self, mu: Planes, p: Planes, u: Planes, w: Planes, kept: Any) -> tuple[Planes, Planes]:
        """Gradients of u and of a from mu, those of the states. It overwrites what `linearise` kept."""
        (h,), (by_z, by_r, by_c, r) = p, kept
        du = [by_z.mul_(mu[0]), by_r.mul_(mu[0]), by_c.mul_(mu[0])]
        return du, [_summed(du[0], h), _summed(du[1], h), _summed(du[2], r.mul_(h))]


def _gates(h: Tensor, u: Planes, w: Planes) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.addcmul(u[0], w[0], h).sigmoid_()
    r = torch.addcmul(u[1], w[1], h).sigmoid_()
    return z, r, torch.mul(r, h).mul_(w[2]).add_(u[2]).tanh_()


def _summed(x: Tensor, y: Tensor) -> Tensor:
    """The sum of x y over batch and time."""
    return (x * y).sum((0, 1))
