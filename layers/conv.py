"""The short convolution in front of a mixer: causal with a state, or over both sides."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.ops import causal_conv1d, depthwise_conv1d, shard
from zoo.ops.core import check
from zoo.ops.core.algebra import Tail
from zoo.ops.core.packing import last_document


class _Taps(nn.Module):
    """The parameters of a depthwise convolution: weight (D, W), bias (D,) or None."""

    def __init__(
        self,
        d_model: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str = "auto",
    ):
        super().__init__()
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(torch.empty(d_model, width))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own start for a convolution with fan-in `width`."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}, activation={self.activation}"


class ShortConvolution(_Taps):
    """Depthwise causal convolution over time, (B, T, D) -> (B, T, D); the state is its last width - 1 inputs."""

    operators = (causal_conv1d,)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the last taps - 1 inputs before it -> y (B, T, D) and those after it."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return causal_conv1d(
            x, weight, bias, state,
            activation=self.activation, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def look_ahead(self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, "TailPrefixes"]:
        """As `forward`; the inputs themselves know the tail after every prefix (see zoo.layers.state.LooksAhead)."""
        y, _ = self(x, state, cu_seqlens=cu_seqlens)
        return y, TailPrefixes(state, x, cu_seqlens)

    def init_state(self, batch: int) -> Tensor:
        """The inputs before the first token: zeros (batch, taps - 1, D)."""
        D, W = self.weight.shape
        return self.weight.new_zeros(batch, W - 1, D)


class TailPrefixes(NamedTuple):
    """The last inputs before any prefix of a call: a slice of the tail before it and its inputs.

    state: (B, W - 1, D); x: (1, n, D), packed documents, one a row; cu_seqlens: (B + 1,).
    """

    state: Tensor
    x: Tensor
    cu_seqlens: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens that each row was given."""
        return self.cu_seqlens.diff().long()

    def at(self, n: Tensor) -> Tensor:
        """The tail (B, W - 1, D) after the first n[b] inputs of each row."""
        B, halo, _ = self.state.shape
        row = torch.arange(B, device=n.device)[:, None]
        place = n[:, None] + torch.arange(halo, device=n.device)  # in the row's tail and inputs, side by side
        inputs = torch.cat([self.x[0], self.x.new_zeros(1, self.x.shape[2])])  # one more, for places in the tail
        new = inputs[torch.where(place < halo, -1, self.cu_seqlens[:-1, None] + place - halo)]
        return torch.where((place < halo)[..., None], self.state[row, place.clamp(max=halo - 1)], new)

    def nbytes(self) -> int:
        """Bytes held beside a state: the inputs of the call."""
        return self.x.numel() * self.x.element_size()


class DepthwiseConvolution(_Taps):
    """Depthwise convolution over both sides of every token, (B, T, D) -> (B, T, D); it needs the whole sequence."""

    operators = (depthwise_conv1d,)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> y (B, T, D), every output from inputs on both sides of it."""
        return depthwise_conv1d(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype),
            activation=self.activation, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip


def side_by_side(
    convs: nn.ModuleList, xs: Sequence[Tensor], states: Sequence[Tensor], *, cu_seqlens: Tensor | None = None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Short convolutions of one width, each on a stream of its own; across ranks one message has all their halos.

    Args:
        convs: of `ShortConvolution`; none leaves the streams as they are.
        xs: as many streams, (B, T, D_i).
        states: what an earlier call returned; empty at the start.

    Returns:
        the outputs (B, T, D_i), and the states.
    """
    if not convs:
        return list(xs), ()
    if shard.current() is not None:
        states = _halos(convs, xs, states, cu_seqlens)
    with shard.unsharded():  # each has what crosses its edge
        outputs = [
            conv(x, states[i] if states else None, cu_seqlens=cu_seqlens)
            for i, (conv, x) in enumerate(zip(convs, xs, strict=True))
        ]
    return [y for y, _ in outputs], tuple(tail for _, tail in outputs)


def _halos(
    convs: nn.ModuleList, xs: Sequence[Tensor], states: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """The rows before this rank's stretch of each stream, (n, W - 1, D_i)."""
    widths = {conv.weight.shape[1] - 1 for conv in convs if isinstance(conv, ShortConvolution)}
    width, (batch, length, _) = max(widths), xs[0].shape
    assert len(widths) == 1, "one width"
    cuts = None if cu_seqlens is None else check.boundaries("short convolutions", cu_seqlens, batch, length)
    n = batch if cuts is None else len(cuts) - 1
    sizes = [x.shape[2] for x in xs]
    state = torch.cat(list(states), dim=2) if states else xs[0].new_zeros(n, width, sum(sizes))
    rows = torch.cat([Tail.of(last_document(cuts, x)[0], width).rows for x in xs], dim=2)
    tails: tuple[Tensor, ...] = shard.halo(Tail(rows, width), state.to(rows.dtype), n > batch).split(sizes, dim=2)
    return tails


def initial_tails(convs: Iterable[nn.Module], batch: int) -> tuple[Tensor, ...]:
    """The states of several short convolutions before the first token."""
    return tuple(conv.init_state(batch) for conv in convs if isinstance(conv, ShortConvolution))
