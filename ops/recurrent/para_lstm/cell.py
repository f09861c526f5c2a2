"""The LSTM with diagonal recurrence, peepholes and one gate to forget and to write: value, Jacobian, gradients."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.scans.newton_scan.cell import Cell, Linearised, Planes


class ParaLSTMCell(Cell):
    """f = sigmoid(a_f h' + p_f c' + u_f), z = tanh(a_z h' + u_z), c = f c' + (1 - f) z,
    o = sigmoid(a_o h' + p_o c + u_o), h = o tanh(c), on states (c, h) and parameters a_f, a_o, a_z, p_f, p_o.
    """  # fmt: skip

    name = "para_lstm"
    states = 2
    bound = 1.0

    def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
        """The states (c, h) after the steps, two planes, from those before them in p."""
        _, _, c, o, tanh_c = _gates(p, u, w)
        return [c, o.mul(tanh_c)]

    def linearise(self, p: Planes, u: Planes, w: Planes) -> Linearised:
        """The value, its 2x2 Jacobian by (c', h'), and what `pull` needs of the gates."""
        c_, _ = p
        a_f, a_o, a_z, p_f, p_o = w
        f, z, c, o, tanh_c = _gates(p, u, w)
        h = torch.mul(o, tanh_c)
        h_by_o = torch.addcmul(h, h, o, value=-1)  # of h by u_o: tanh(c) o (1 - o)
        h_by_c = torch.addcmul(o, h, tanh_c, value=-1).addcmul_(h_by_o, p_o)  # o (1 - tanh(c)^2), and by the peephole
        c_by_f = torch.addcmul(f, f, f, value=-1).mul_(c_.sub(z))  # of c by u_f
        c_by_z = z.mul_(z).neg_().add_(1).mul_(1 - f)  # of c by u_z
        cc = f.addcmul_(c_by_f, p_f)
        ch = torch.mul(c_by_f, a_f).addcmul_(c_by_z, a_z)
        jacobian = [[cc, ch], [torch.mul(h_by_c, cc), torch.mul(h_by_c, ch).addcmul_(h_by_o, a_o)]]
        return Linearised([c, h], jacobian, (c_by_f, c_by_z, h_by_o, h_by_c, c))

    def pull(self, mu: Planes, p: Planes, u: Planes, w: Planes, kept: Any) -> tuple[Planes, Planes]:
        """Gradients of u and of the parameters from mu, those of (c, h). It overwrites what `linearise` kept."""
        (c_, h_), (c_by_f, c_by_z, h_by_o, h_by_c, c) = p, kept
        dc = h_by_c.mul_(mu[1]).add_(mu[0])
        df, do, dz = c_by_f.mul_(dc), h_by_o.mul_(mu[1]), c_by_z.mul_(dc)
        pairs = ((df, h_), (do, h_), (dz, h_), (df, c_), (do, c))
        return [df, do, dz], [(x * y).sum((0, 1)) for x, y in pairs]


def _gates(p: Planes, u: Planes, w: Planes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f, z, the new c, o, tanh(c)."""
    c_, h_ = p
    a_f, a_o, a_z, p_f, p_o = w
    f = torch.addcmul(u[0], a_f, h_).addcmul_(p_f, c_).sigmoid_()
    z = torch.addcmul(u[2], a_z, h_).tanh_()
    c = torch.lerp(z, c_, f)
    o = torch.addcmul(u[1], a_o, h_).addcmul_(p_o, c).sigmoid_()
    return f, z, c, o, c.tanh()
