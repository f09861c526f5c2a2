"""Fast torch form: W shifted multiply-adds, a block of time after another, with no transposition to (B, D, T)."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# Numbers in a block of time: what one block makes stays in the cache, and memory is read and written once. CPU time of
# forward + backward, D = 1536, one thread of an EPYC (32 MiB of L3), against arrays of the whole length: T = 1024:
# 27.7 us a token, in blocks of 2**15, 2**16, 2**17, 2**18 numbers 26.1, 20.9, 17.6, 16.0; T = 8192: 49.3, then 33.2,
# 27.8, 23.6, 22.5.
BLOCK_NUMBERS = 2**18
BLOCK_MIN = 16  # steps


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """One token, T = 1: what decoding calls."""
    window = torch.cat([state, x], dim=1)  # (B, (W - 1) dilation + 1, D)
    y = (window[:, ::dilation] * weight.t()).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation == "silu" else y, window[:, 1:]


def causal_conv1d_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None, cuts: tuple[int, ...] | None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every document is preceded by its (W - 1) dilation rows of history, so that no tap ever crosses a border."""
    silu = activation == "silu"
    halo, length = (weight.shape[1] - 1) * dilation, x.shape[1]
    if cuts is None:
        y = _convolved(x, state, weight, bias, silu, dilation)
        # A copy: a view would keep all of x alive as long as the state.
        return y, torch.cat([state[:, min(length, halo) :], x[:, max(0, length - halo) :]], dim=1)
    rows: list[int] = []  # of the stream with every document's history before it: indices into [x; state]
    outputs: list[int] = []
    tails: list[int] = []
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        rows += [length + i * halo + j for j in range(halo)]
        outputs += range(len(rows) - halo, len(rows) - halo + right - left)
        rows += range(left, right)
        tails += range(len(rows) - halo, len(rows))
        rows += [left] * (-(right - left) % dilation)  # the next document begins at the phase of this one
    stream = torch.cat([x[0], state.flatten(0, 1)])[torch.tensor(rows, device=x.device)]  # (T + n halo + ..., D)
    y = _convolved(stream[None, halo:], stream[None, :halo], weight, bias, silu, dilation)
    y = y[:, torch.tensor(outputs, dtype=torch.long, device=x.device)]
    return y, stream[torch.tensor(tails, dtype=torch.long, device=x.device)].unflatten(0, state.shape[:2])


def _convolved(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, dilation: int
) -> Tensor:  # fmt: skip
    """Steps of one phase, t modulo `dilation`, see each other alone: they are channels side by side, and nothing moves.

    time            0 1 2 3 4 5 6 7      dilation 2      (0 1) (2 3) (4 5) (6 7)      four steps of two phases
    """
    if dilation == 1:
        near: Tensor = apply(_Taps, x, state, weight, bias, silu)
        return near
    length = x.shape[1]
    ragged = -length % dilation
    x = F.pad(x, (0, 0, 0, ragged)) if ragged else x
    y: Tensor = apply(
        _Taps, x.reshape(x.shape[0], -(-length // dilation), dilation, x.shape[2]),
        state.reshape(state.shape[0], weight.shape[1] - 1, dilation, state.shape[2]), weight, bias, silu,
    )  # fmt: skip
    return y.flatten(1, 2)[:, :length]


class _Taps(torch.autograd.Function):
    """(B, T, ..., D) after (B, W - 1, ..., D) -> (B, T, ..., D), the same taps for all numbers of a channel.

    The backward makes the sums before the activation again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        taps = weight.t().contiguous()  # a strided column under every row costs four times as much
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for left, right in _blocks(x):
            z = _sums(_window(x, state, left, right), taps, bias)
            y[:, left:right] = F.silu(z, inplace=True) if silu else z
        ctx.save_for_backward(x, state, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @first_order("causal_conv1d")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, state, weight, bias = ctx.saved_tensors
        taps, (width, halo), length = weight.t().contiguous(), (weight.shape[1], state.shape[1]), x.shape[1]
        dx, dstate = (torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(state))
        wide = torch.promote_types(x.dtype, torch.float32)
        dtaps = torch.zeros_like(taps, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        channels = tuple(range(x.ndim - 1))  # all dimensions but theirs
        for left, right in _blocks(x):
            # dx needs the W - 1 steps after its own: they are made twice
            n, after = right - left, min(right + halo, length)
            window, dz = _window(x, state, left, after), dy[:, left:after]
            if ctx.silu:
                dz = torch.ops.aten.silu_backward(dz, _sums(window, taps, bias))
            for w in range(width):
                dtaps[w] += (dz[:, :n] * window[:, w : w + n]).sum(channels, dtype=wide)
            if dbias is not None:
                dbias += dz[:, :n].sum(channels, dtype=wide)
            if after < right + halo:
                dz = F.pad(dz, (0, 0) * (x.ndim - 2) + (0, right + halo - after))
            here = torch.mul(dz[:, halo : halo + n], taps[0], out=dx[:, left:right])
            for w in range(1, width):
                here.addcmul_(dz[:, halo - w : halo - w + n], taps[w])
            if left == 0:
                for w in range(halo):
                    dstate[:, w:].addcmul_(dz[:, : halo - w], taps[w])
        return (
            dx,
            dstate,
            dtaps.t().to(weight.dtype),
            None if bias is None or dbias is None else dbias.to(bias.dtype),
            None,
        )


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Cut time into stretches of about BLOCK_NUMBERS numbers."""
    length = x.shape[1]
    size = max(BLOCK_MIN, BLOCK_NUMBERS // max(1, x[:, :1].numel()))
    return ((left, min(left + size, length)) for left in range(0, length, size))


def _window(x: Tensor, state: Tensor, left: int, right: int) -> Tensor:
    """The inputs that the steps [left, right) see: theirs and the W - 1 before."""
    first = left - state.shape[1]
    return x[:, first:right] if first >= 0 else torch.cat([state[:, left:], x[:, :right]], dim=1)


def _sums(window: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum_w taps[w] * x_{t - (W-1) + w}."""
    width = len(taps)
    n = window.shape[1] - width + 1
    last = window[:, width - 1 :]
    z = last * taps[-1] if bias is None else torch.addcmul(bias, last, taps[-1])
    for w in range(width - 1):
        z.addcmul_(window[:, w : w + n], taps[w])
    return z
