"""ParaGRU and ParaLSTM: nonlinear cells with diagonal recurrence, behind a short convolution and a gate."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.conv import ShortConvolution
from zoo.layers.mixer import Solver
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import GatedRMSNorm
from zoo.ops import para_gru, para_lstm

__all__ = ["ParaGRU", "ParaLSTM"]


class ParaState(NamedTuple):
    """h: (B, D) of ParaGRU, (B, D, 2) of ParaLSTM (c, then h), float32; conv: the convolution's last inputs."""

    h: Tensor
    conv: Tensor


class _ParaRNN(Solver):
    """The mixer around either cell, (B, T, D) -> (B, T, D): y = W_o norm(cell(conv(W_x input)) * silu(W_g input)).

    Args:
        d_model: D, a multiple of n_heads.
        n_heads: blocks of the map from the input to the gates; the recurrence is channel by channel in any case.
        d_conv: width of the short convolution.
        recurrent_clip: bound of the recurrent weights, or None. With 0.5 the cell is nearly contractive, so that
            Newton's method takes 3 or 4 steps whatever was learnt; counting (parity) is learnt without a bound only.
        iterations: Newton steps, unchecked, as in the paper (3); None: as many as the loop's states take.
        backend: of the cell and the convolution.

    `residual` is that of the newest call while `watched` was true (see zoo.ops.newton_residual): training logs it.
    """

    weight_decay: ClassVar = {"B": True}  # a matrix, in blocks
    states = 1  # numbers of state a channel
    peepholes = False

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_conv: int = 4,
        recurrent_clip: float | None = 0.5,
        iterations: int | None = None,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model = {d_model}; got {n_heads}")
        if recurrent_clip is not None and not recurrent_clip > 0:
            raise ValueError(f"recurrent_clip must be positive, or None for no bound; got {recurrent_clip}")
        if iterations is not None and iterations < 1:
            raise ValueError(f"iterations must be at least 1, or None for as many as it takes; got {iterations}")
        self.recurrent_clip, self.iterations, self.backend = recurrent_clip, iterations, backend
        D, each = d_model, d_model // n_heads
        self.in_proj = nn.Linear(D, 2 * D, bias=False)  # [x, gate]
        self.conv1d = ShortConvolution(D, d_conv, bias=True, backend=backend)
        self.B = nn.Parameter(torch.empty(n_heads, each, 3, each))
        self.b = nn.Parameter(torch.empty(3, D))
        self.a = nn.Parameter(torch.empty(3, D))
        self.p = nn.Parameter(torch.empty(2, D)) if self.peepholes else None
        self.norm = GatedRMSNorm(D, eps=norm_eps, order="gate_first")
        self.out_proj = nn.Linear(D, D, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """B uniform in +-sqrt(3 / fan-in), recurrent weights normal with deviation D**-0.5 cut at 0.9, biases 0."""
        bound = (3 / self.B.shape[1]) ** 0.5
        self.conv1d.reset_parameters()
        nn.init.uniform_(self.B, -bound, bound)
        nn.init.zeros_(self.b)
        for recurrent in (self.a,) if self.p is None else (self.a, self.p):
            nn.init.trunc_normal_(recurrent, std=self.b.shape[1] ** -0.5, a=-0.9, b=0.9)

    def forward(
        self, x: Tensor, state: ParaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ParaState]:
        h, tail = (None, None) if state is None else state
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x, tail = self.conv1d(x, tail, cu_seqlens=cu_seqlens)
        y, h, *residual = self._cell(
            self._gates(x), h, recurrent_clip=self.recurrent_clip, iterations=self.iterations, cu_seqlens=cu_seqlens,
            return_residual=self.watched, backend=self.backend,
        )  # fmt: skip
        if residual:
            self.residual = residual[0]
        return self.out_proj(self.norm(y, gate)), ParaState(h, tail)

    def _gates(self, x: Tensor) -> Tensor:
        """What the input says to the gates, (B, T, 3, D)."""
        (heads, each), (batch, T) = self.B.shape[:2], x.shape[:2]
        B, b = self.B.to(x.dtype), self.b.to(x.dtype)
        if heads == 1:
            u = x @ B[0].flatten(1)  # (B, T, 3 D)
            u_h: Tensor = u.unflatten(-1, (3, each)) + b
            return u_h
        rows = x.reshape(batch * T, heads, each).transpose(0, 1)
        u = torch.bmm(rows, B.flatten(2)).view(heads, batch, T, 3, each)
        return u.permute(1, 2, 3, 0, 4).reshape(batch, T, 3, heads * each) + b

    def _cell(self, u: Tensor, h: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def init_state(self, batch: int) -> ParaState:
        """The state before the first token."""
        D = self.a.shape[1]
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        shape = (batch, D) if self.states == 1 else (batch, D, self.states)
        return ParaState(torch.zeros(shape, dtype=dtype, device=self.a.device), self.conv1d.init_state(batch))


@register_mixer("para_gru")
class ParaGRU(_ParaRNN):
    """A GRU with diagonal recurrent matrices, solved for all times at once by Newton's method."""

    __doc__ = f"""A GRU with a diagonal recurrent matrix, trained in parallel over time by Newton's method.

    {_ParaRNN.__doc__}
    Source: arXiv 2510.21450, sections 2 and 3, figure 9.
    """

    operators = (para_gru,)

    def _cell(self, u: Tensor, h: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        return para_gru(u, self.a, h, **options)


@register_mixer("para_lstm")
class ParaLSTM(_ParaRNN):
    """An LSTM with diagonal recurrent matrices, solved for all times at once by Newton's method."""

    __doc__ = f"""An LSTM with diagonal recurrent matrices, one gate to forget and to write, and peepholes, in parallel.

    {_ParaRNN.__doc__}
    Source: arXiv 2510.21450, sections 2 and 3, figure 9.
    """

    operators = (para_lstm,)
    states, peepholes = 2, True

    def _cell(self, u: Tensor, h: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        assert self.p is not None
        return para_lstm(u, self.a, self.p, h, **options)
