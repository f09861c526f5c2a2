"""What tells the cells apart: their gates and states, one step forward, and the linear recurrence of their gradients.

A cell's pointwise part mixes no numbers, so its Jacobians are elementwise. `backward` makes them for all steps at once
from what the forward kept; what is left for its loop is linear in the gradients, a few calls a step.

Buffers are of rows (token, head) in the order of `layout.Slabs`, views of one step are (H, n, ...).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zoo.ops.recurrent.rnn_sequential.layout import Slabs

_softplus: Callable[..., Tensor] = torch._C._nn.softplus  # its declared arguments leave `out` away


class Cell:
    """One cell.

    name: of the public operator.
    gates: pre-activations, as many as biases.
    given: how many of them x has, the last ones.
    recurrent: how many of them R has, the first ones.
    states: S; the first is h.
    kept: buffers besides the recurrent gates that the backward reads; the states come first.
    """

    name: ClassVar[str]
    gates: ClassVar[int] = 4
    given: ClassVar[int] = 4
    recurrent: ClassVar[int] = 4
    states: ClassVar[int]
    kept: ClassVar[int]

    def forward(self, gates: Tensor, kept: Tensor, state: Tensor, W: Tensor, slabs: Slabs) -> None:
        """All steps, in place.

        Args:
            gates: what is summed with R h, (rows, recurrent, D); becomes what `backward` reads.
            kept: (kept, rows, D), to be filled; the last of them holds the gates without R, if there are any.
            state: (S, H, n, D) before the first step.
            W: (H, D, recurrent * D), R as the right factor.
        """
        raise NotImplementedError

    def backward(
        self, gates: Tensor, kept: Tensor, state: Tensor, dh: Tensor, dlast: Tensor, W: Tensor, slabs: Slabs
    ) -> tuple[Tensor, Tensor]:
        """Gradients of all gates, (rows, gates, D), and of the state before the first step, (S, H, n, D).

        Args:
            gates: (rows, recurrent, D), as `forward` left them.
            dh: (rows, D), what arrives at each h from outside; overwritten.
            dlast: (S, H, n, D), what arrives at the last states; the first of them is in dh already. Overwritten.
            W: (H, recurrent * D, D), R as the right factor of gradients.
        """
        raise NotImplementedError


class Lstm(Cell):
    """LSTM: gates i, f, z, o and states h, c. It keeps h and c of every step."""

    name, states, kept = "lstm", 2, 2

    def forward(self, gates: Tensor, kept: Tensor, state: Tensor, W: Tensor, slabs: Slabs) -> None:
        """Walk the steps: preactivations in `gates` become activations, `kept` gets h and c."""
        a, both = slabs.steps(gates.flatten(1)), slabs.steps(gates[:, :2])
        each = [slabs.steps(gate) for gate in gates.unbind(1)]
        h, c = state
        for a_t, i_f, i, f, z, o, new_h, new_c in zip(a, both, *each, *map(slabs.steps, kept), strict=True):
            n = a_t.shape[1]
            a_t.baddbmm_(h[:, :n], W)
            i_f.sigmoid_()
            z.tanh_()
            o.sigmoid_()
            torch.mul(f, c[:, :n], out=new_c)
            new_c.addcmul_(i, z)
            torch.tanh(new_c, out=new_h)
            new_h.mul_(o)
            h, c = new_h, new_c

    def backward(
        self, gates: Tensor, kept: Tensor, state: Tensor, dh: Tensor, dlast: Tensor, W: Tensor, slabs: Slabs
    ) -> tuple[Tensor, Tensor]:
        """The gradients of all preactivations and of the first state, from those of all h and of the last state."""
        i, f, z, o = gates.unbind(1)
        c, before = kept[1].tanh(), slabs.before(kept[1], state[1])
        K = torch.stack(
            [z * _sigmoid_slope(i), before * _sigmoid_slope(f), i * _tanh_slope(z), c * _sigmoid_slope(o)], dim=1
        )
        show = slabs.steps(_tanh_slope(c).mul_(o))  # d h / d c
        dg, d_ifz, d_o = slabs.steps(K.flatten(1)), slabs.steps(K[:, :3]), slabs.steps(K[:, 3])
        dhs, fs, dc = slabs.steps(dh), slabs.steps(f), dlast[1]
        for t in reversed(range(len(dg))):
            _from_the_next(t, dhs, dg, W)
            dc_t = dc[:, : dhs[t].shape[1]]
            dc_t.addcmul_(dhs[t], show[t])
            d_ifz[t].mul_(dc_t.unsqueeze(2))
            d_o[t].mul_(dhs[t])
            dc_t.mul_(fs[t])
        return K, torch.stack([torch.bmm(dg[0], W), dc])


class Gru(Cell):
    """Gates g, r, z, n, where g is the recurrent part of n alone; kept: h, n."""

    name, given, recurrent, states, kept = "gru", 3, 3, 1, 2

    def forward(self, gates: Tensor, kept: Tensor, state: Tensor, W: Tensor, slabs: Slabs) -> None:
        """Walk the steps: preactivations in `gates` become activations, `kept` gets h and n."""
        a, both = slabs.steps(gates.flatten(1)), slabs.steps(gates[:, 1:])
        each = [slabs.steps(gate) for gate in gates.unbind(1)]
        (h,) = state
        for a_t, r_z, g_t, r_t, z_t, new_h, n_t in zip(a, both, *each, *map(slabs.steps, kept), strict=True):
            h = h[:, : a_t.shape[1]]
            a_t.baddbmm_(h, W)
            r_z.sigmoid_()
            n_t.addcmul_(r_t, g_t).tanh_()
            h = torch.lerp(n_t, h, z_t, out=new_h)  # z h + (1 - z) n

    def backward(
        self, gates: Tensor, kept: Tensor, state: Tensor, dh: Tensor, dlast: Tensor, W: Tensor, slabs: Slabs
    ) -> tuple[Tensor, Tensor]:
        """The gradients of all preactivations and of the first state, from those of all h and of the last state."""
        g, r, z = gates.unbind(1)
        n, before = kept[1], slabs.before(kept[0], state[0])
        K_n = _tanh_slope(n).mul_(1 - z)
        K = torch.stack([K_n * r, K_n * g * _sigmoid_slope(r), (before - n) * _sigmoid_slope(z)], dim=1)
        flat, each = slabs.steps(K.flatten(1)), slabs.steps(K)
        dhs, zs = slabs.steps(dh), slabs.steps(z)
        for t in reversed(range(len(flat))):
            _from_the_next(t, dhs, flat, W)
            if t + 1 < len(flat):
                dhs[t][:, : dhs[t + 1].shape[1]].addcmul_(dhs[t + 1], zs[t + 1])
            each[t].mul_(dhs[t].unsqueeze(2))
        d0 = torch.bmm(flat[0], W).addcmul_(dhs[0], zs[0])
        return torch.cat([K, (K_n * dh).unsqueeze(1)], dim=1), d0.unsqueeze(0)


class Elman(Cell):
    """Kept: h, which is its only gate."""

    name, gates, given, recurrent, states, kept = "elman", 1, 1, 1, 1, 1

    def forward(self, gates: Tensor, kept: Tensor, state: Tensor, W: Tensor, slabs: Slabs) -> None:
        """Walk the steps: `kept` gets tanh of the preactivations, which are the states."""
        (h,) = state
        for a_t, new_h in zip(slabs.steps(gates.flatten(1)), slabs.steps(kept[0]), strict=True):
            a_t.baddbmm_(h[:, : a_t.shape[1]], W)
            h = torch.tanh(a_t, out=new_h)

    def backward(
        self, gates: Tensor, kept: Tensor, state: Tensor, dh: Tensor, dlast: Tensor, W: Tensor, slabs: Slabs
    ) -> tuple[Tensor, Tensor]:
        """The gradients of all preactivations and of the first state, from those of all h and of the last state."""
        K = _tanh_slope(kept[0])
        dg, dhs = slabs.steps(K), slabs.steps(dh)
        for t in reversed(range(len(dg))):
            _from_the_next(t, dhs, dg, W)
            dg[t].mul_(dhs[t])
        return K.unsqueeze(1), torch.bmm(dg[0], W).unsqueeze(0)


class Slstm(Cell):
    """Kept: h, c, n, m and -logsigmoid(f).

    (c, n, m) and (c e^-s, n e^-s, m + s) are the same memory, and h cannot tell them apart. So the gradient of what m
    is set to, E = dm - c dc - n dn, comes from the last state alone, and passes a step where m = logsigmoid(f) + m'
    won, unchanged, and ends where m = i did.
    """

    name, states, kept = "slstm", 4, 5

    def forward(self, gates: Tensor, kept: Tensor, state: Tensor, W: Tensor, slabs: Slabs) -> None:
        """Walk the steps: preactivations in `gates` become activations, `kept` gets the states and -logsigmoid(f)."""
        a, both = slabs.steps(gates.flatten(1)), slabs.steps(gates[:, :2])
        each = [slabs.steps(gate) for gate in gates.unbind(1)]
        h, m, memory = state[0], state[3], state[1:3].permute(1, 2, 0, 3)
        empty = state[2] == 0  # possible before the first step only: n is at least 1 after any
        hs, ms, shuts, memories = (slabs.steps(x) for x in (kept[0], kept[3], kept[4], kept[1:3].transpose(0, 1)))
        cs, ns = slabs.steps(kept[1]), slabs.steps(kept[2])
        for t, (a_t, i_f, i, f, z, o, new_h, new_m, shut, new, c, n) in enumerate(
            zip(a, both, *each, hs, ms, shuts, memories, cs, ns, strict=True)
        ):
            count = a_t.shape[1]
            a_t.baddbmm_(h[:, :count], W)
            torch.neg(f, out=shut)
            _softplus(shut, 1, 40, out=shut)  # torch's logsigmoid starts threads for tensors of any size
            torch.sub(m[:, :count], shut, out=f)
            torch.maximum(i, f, out=new_m)
            if t == 0:
                torch.where(empty, i, new_m, out=new_m)
            i_f.sub_(new_m.unsqueeze(2))
            if t == 0:
                f.clamp_(max=0.0)  # does nothing but to an empty memory, where it is any number times zero
            i_f.exp_()
            z.tanh_()
            o.sigmoid_()
            torch.mul(memory[:, :count], f.unsqueeze(2), out=new)  # (H, n, 2, D)
            c.addcmul_(i, z)
            n.add_(i)
            torch.div(c, n, out=new_h)
            new_h.mul_(o)
            h, m, memory = new_h, new_m, new

    def backward(
        self, gates: Tensor, kept: Tensor, state: Tensor, dh: Tensor, dlast: Tensor, W: Tensor, slabs: Slabs
    ) -> tuple[Tensor, Tensor]:
        """The gradients of all preactivations and of the first state, from those of all h and of the last state."""
        i, f, z, o = gates.unbind(1)
        _, c, n, m, shut = kept
        c1, n1, m1 = (slabs.before(kept[k], state[k]) for k in (1, 2, 3))
        slope_f = -torch.expm1(-shut)  # sigmoid(-f)
        ratio = c / n
        show = torch.stack([o / n, -ratio * o / n], dim=1)  # d h / d (c, n)
        by_c = torch.stack([i * z, f * c1 * slope_f, i * _tanh_slope(z)], dim=1)
        by_n = torch.stack([i, f * n1 * slope_f], dim=1)
        K = torch.empty_like(gates)
        K[:, 3] = ratio * _sigmoid_slope(o)
        won = (m1 - shut == m) & (n1 != 0)  # m = logsigmoid(f) + m'
        through = slabs.carried(won, dlast[3] - slabs.last(c) * dlast[1] - slabs.last(n) * dlast[2])  # E
        dg, by_cs, by_ns = (slabs.steps(x) for x in (K.flatten(1), by_c, by_n))
        d_ifz, d_if, d_o = slabs.steps(K[:, :3]), slabs.steps(K[:, :2]), slabs.steps(K[:, 3])
        dhs, shows, fs, carry = slabs.steps(dh), slabs.steps(show), slabs.steps(f), dlast[1:3].permute(1, 2, 0, 3)
        direct = None
        if through is not None:
            passed = torch.where(won, through, 0)
            direct = slabs.steps(torch.stack([through - passed, passed * slope_f], dim=1))
        for t in reversed(range(len(dg))):
            _from_the_next(t, dhs, dg, W)
            now = carry[:, : dhs[t].shape[1]]  # (H, n, 2, D)
            now.addcmul_(dhs[t].unsqueeze(2), shows[t])
            torch.mul(by_cs[t], now[:, :, :1], out=d_ifz[t])
            d_if[t].addcmul_(by_ns[t], now[:, :, 1:])
            if direct is not None:
                d_if[t].add_(direct[t])
            d_o[t].mul_(dhs[t])
            now.mul_(fs[t].unsqueeze(2))
        dc, dn = carry.permute(2, 0, 1, 3)
        dm = state[1] * dc + state[2] * dn
        if through is not None:
            dm += slabs.steps(passed)[0]
        return K, torch.stack([torch.bmm(dg[0], W), dc, dn, dm])


CELLS: dict[str, Cell] = {cell.name: cell for cell in (Lstm(), Gru(), Elman(), Slstm())}


def _sigmoid_slope(y: Tensor) -> Tensor:
    """The derivative of the sigmoid where it is y."""
    return (1 - y).mul_(y)


def _tanh_slope(y: Tensor) -> Tensor:
    """The derivative of tanh where it is y."""
    return torch.addcmul(torch.ones((), dtype=y.dtype, device=y.device), y, y, value=-1)


def _from_the_next(t: int, dh: Sequence[Tensor], dg: Sequence[Tensor], W: Tensor) -> None:
    """What the gates of step t + 1 send back to h of step t; fewer rows may go on than end here."""
    if t + 1 < len(dg):
        dh[t][:, : dg[t + 1].shape[1]].baddbmm_(dg[t + 1], W)
