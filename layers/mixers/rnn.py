"""Recurrent networks with memory mixing: LSTM, GRU, Elman's network and sLSTM, a recurrent matrix for each head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.conv import ShortConvolution
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import HeadNorm
from zoo.ops import elman, gru, lstm, slstm

__all__ = ["GRU", "LSTM", "SLSTM", "Elman"]


class RNNState(NamedTuple):
    """cell: (B, S, H, D) float32, as of the operator."""

    cell: Tensor


class SLSTMState(NamedTuple):
    """cell: h, c, n, m, (B, 4, H, D) float32; conv: the last width - 1 inputs of the convolution, empty without one."""

    cell: Tensor
    conv: Tensor


def _head_size(name: str, d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        raise ValueError(f"{name}: n_heads must divide d_model = {d_model}; got {n_heads}")
    return d_model // n_heads


def _initial_cell(states: int, batch: int, like: Tensor) -> Tensor:
    """Zeros (B, S, H, D) for biases like (gates, H, D)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(batch, states, *like.shape[1:], dtype=dtype, device=like.device)


class _Recurrent(Mixer):
    """A mixer around one cell, (B, T, D) -> (B, T, D): y = W_o norm(cell(W_i x)), the norm over each head."""

    given: int  # gates that the input feeds
    recurrent: int  # gates with a matrix
    gates: int  # gates with a bias
    states: int

    def __init__(self, d_model: int, *, n_heads: int = 4, norm_eps: float = 1e-5, backend: str = "auto"):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, _head_size(type(self).__name__, d_model, n_heads)
        self.backend = backend
        self.in_proj = nn.Linear(d_model, self.given * d_model, bias=False)
        self.R = nn.Parameter(torch.empty(self.recurrent, n_heads, self.head_dim, self.head_dim))
        self.b = nn.Parameter(torch.empty(self.gates, n_heads, self.head_dim))
        self.norm = HeadNorm(n_heads, self.head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """torch's own range for matrices, and biases of zero."""
        nn.init.uniform_(self.R, -(self.head_dim**-0.5), self.head_dim**-0.5)
        nn.init.zeros_(self.b)

    def _run(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: RNNState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RNNState]:
        given = self.in_proj(x).unflatten(-1, (self.given, self.n_heads, self.head_dim))  # (B, T, gates, H, D)
        h, cell = self._run(given, None if state is None else state.cell, cu_seqlens)
        return self.out_proj(self.norm(h).flatten(2)), RNNState(cell)

    def init_state(self, batch: int) -> RNNState:
        """The state before the first token."""
        return RNNState(_initial_cell(self.states, batch, self.b))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, head_dim={self.head_dim}"


@register_mixer("lstm")
class LSTM(_Recurrent):
    """Long short-term memory as a mixer, (B, T, D) -> (B, T, D): y = W_o norm(LSTM(W_i x)); see `zoo.ops.lstm`.

    Args:
        d_model: D.
        n_heads: heads of D / n_heads with recurrent matrices of their own; they meet in W_i and W_o only.
        norm_eps: of the norm over each head.
        backend: of zoo.ops.lstm.

    Source: heads as in arXiv 2412.07752; forget gates start open, as in Jozefowicz et al. 2015.
    """

    operators = (lstm,)

    given, recurrent, gates, states = 4, 4, 4, 2

    def initialise(self, n_layers: int = 1) -> None:
        """torch's own range for matrices; forget biases of one, the others of zero."""
        super().initialise(n_layers)
        nn.init.ones_(self.b[1])

    def _run(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return lstm(x, self.R.to(x.dtype), self.b.to(x.dtype), state, cu_seqlens=cu_seqlens, backend=self.backend)


@register_mixer("gru")
class GRU(_Recurrent):
    """Gated recurrent unit as a mixer, (B, T, D) -> (B, T, D): y = W_o norm(GRU(W_i x)); arguments as of `LSTM`.

    Source: heads as in arXiv 2412.07752.
    """

    operators = (gru,)

    given, recurrent, gates, states = 3, 3, 4, 1

    def _run(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return gru(x, self.R.to(x.dtype), self.b.to(x.dtype), state, cu_seqlens=cu_seqlens, backend=self.backend)


@register_mixer("elman")
class Elman(_Recurrent):
    """Elman's network as a mixer, (B, T, D) -> (B, T, D): y = W_o norm(Elman(W_i x)); arguments as of `LSTM`.

    Source: heads as in arXiv 2412.07752.
    """

    operators = (elman,)

    given, recurrent, gates, states = 1, 1, 1, 1

    def _run(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return elman(x, self.R.to(x.dtype), self.b.to(x.dtype), state, cu_seqlens=cu_seqlens, backend=self.backend)


@register_mixer("slstm")
class SLSTM(Mixer):
    """xLSTM's sLSTM as a mixer, (B, T, D) -> (B, T, D): y = norm(sLSTM(i, f from silu(conv(x)); z, o from x)).

    All maps are one matrix a head, and heads never meet here: a feed-forward behind the mixer lets them. See
    `zoo.ops.slstm`.

    Args:
        d_model: D of the input; heads have D / n_heads.
        n_heads: heads with matrices of their own.
        conv_size: width of the short convolution in front of i and f, or None.
        depth: where in its model the layer stands, from 0 for the first to 1 for the last; deeper layers start with
            more units that remember for long.
        norm_eps: of the norm over each head.
        backend: of zoo.ops.slstm and the convolution.

    Source: arXiv 2405.04517, section 2.2 and appendix A.
    """

    operators = (slstm,)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        conv_size: int | None = 4,
        depth: float = 0.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, _head_size("SLSTM", d_model, n_heads)
        self.depth, self.backend = depth, backend
        H, D = n_heads, self.head_dim
        self.conv = None if conv_size is None else ShortConvolution(d_model, conv_size, bias=True, backend=backend)
        self.W = nn.Parameter(torch.empty(4, H, D, D))  # of i, f, z, o; (D_out, D_in) a head
        self.R = nn.Parameter(torch.empty(4, H, D, D))
        self.b = nn.Parameter(torch.empty(4, H, D))
        self.norm = HeadNorm(H, D, eps=norm_eps)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The published start: no recurrence, and forget biases from 5 down to -7 by a power law over each head."""
        D = self.head_dim
        nn.init.normal_(self.W, std=(2 / (5 * D)) ** 0.5)
        nn.init.zeros_(self.R)
        nn.init.zeros_(self.b)
        if self.conv is not None:
            self.conv.reset_parameters()
        with torch.no_grad():
            j = torch.arange(D, dtype=torch.float64, device=self.b.device) / max(1, D - 1)
            self.b[1] = 5 - 12 * j ** (0.3 + 1.3 * self.depth)

    def forward(
        self, x: Tensor, state: SLSTMState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, SLSTMState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        cell, tail = (None, None) if state is None else state
        convolved, tail = self._convolved(x, tail, cu_seqlens)
        heads = (self.n_heads, self.head_dim)
        W = self.W.to(x.dtype)
        i_f = torch.einsum("bthp,ghqp->btghq", convolved.unflatten(-1, heads), W[:2])
        z_o = torch.einsum("bthp,ghqp->btghq", x.unflatten(-1, heads), W[2:])
        gates = torch.cat([i_f, z_o], dim=2)  # (B, T, 4, H, D)
        R, b = self.R.to(gates.dtype), self.b.to(gates.dtype)
        h, cell = slstm(gates, R, b, cell, cu_seqlens=cu_seqlens, backend=self.backend)
        return self.norm(h).flatten(2), SLSTMState(cell, tail)

    def _convolved(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conv is not None:
            convolved: tuple[Tensor, Tensor] = self.conv(x, tail, cu_seqlens=cu_seqlens)
            return convolved
        if tail is None:
            tail = x.new_zeros(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, 0, x.shape[-1])
        return x, tail

    def init_state(self, batch: int) -> SLSTMState:
        """The state before the first token."""
        empty = self.b.new_zeros(batch, 0, self.n_heads * self.head_dim)
        return SLSTMState(_initial_cell(4, batch, self.b), empty if self.conv is None else self.conv.init_state(batch))

    def extra_repr(self) -> str:
        """Heads and their width, for print(model)."""
        return f"n_heads={self.n_heads}, head_dim={self.head_dim}"
