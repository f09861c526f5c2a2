"""S4 and S4D: time-invariant structured state spaces, trained as long convolutions and run as recurrences."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers import hippo
from zoo.layers.channel_dropout import ChannelDropout
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import s4, s4d, shard
from zoo.ops.core import dispatch
from zoo.ops.core.pairs import as_complex, as_pairs

__all__ = ["S4"]

MODES = ("diag", "dplr")
RULES = ("zoh", "bilinear")


class S4State(NamedTuple):
    """x: (B, D, N / 2, 2), one of each pair of complex states of every channel, float32."""

    x: Tensor


@register_mixer("s4")
class S4(Mixer):
    """The S4 block's layer, (B, T, D) -> (B, T, D): y = GLU(W dropout(gelu(SSM(x)))), one system per channel.

    SSM: x' = A x + B u, y = C x + D u in steps of dt, with N states a channel.

    Args:
        d_model: D.
        d_state: N, real states a channel, in N / 2 conjugate pairs.
        mode: "diag" (S4D) or "dplr" (S4: A is diagonal minus P P^*).
        init: A and B at the start, "legs", "lin", "inv" or "real"; when omitted "lin" for diag. S4 starts as LegS.
        rule: "zoh" (diag only) or "bilinear"; when omitted zoh for diag.
        n_ssm: how many copies of A, B and P the channels share: channel i uses copy i modulo n_ssm. None for one each.
        dt_min, dt_max: steps are log-uniform between them.
        dropout: of whole channels of a sequence, the same at all times.
        lr: the system's own learning rate where the optimiser's is larger: of A, B, P and dt. None for no limit.
        bidirectional: a second kernel over the future; then there is no state, and no causal model takes the layer.
        backend: of zoo.ops.s4d and zoo.ops.s4.

    Source: arXiv 2111.00396, section 3.4; arXiv 2206.11893.
    """

    operators = (s4, s4d)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        mode: str = "diag",
        init: str | None = None,
        rule: str | None = None,
        n_ssm: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dropout: float = 0.0,
        lr: float | None = 1e-3,
        bidirectional: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"S4: mode must be one of {', '.join(MODES)}; got {mode!r}")
        init = init or ("lin" if mode == "diag" else "legs")
        rule = rule or ("zoh" if mode == "diag" else "bilinear")
        if init not in hippo.INITS or (mode == "dplr" and init != "legs"):
            allowed = ", ".join(hippo.INITS if mode == "diag" else ("legs",))
            raise ValueError(f"S4: init must be one of {allowed} with mode={mode!r}; got {init!r}")
        if rule not in RULES or (mode == "dplr" and rule != "bilinear"):
            raise ValueError(f"S4: rule must be bilinear, or zoh with mode='diag'; got {rule!r} with mode={mode!r}")
        n_ssm = d_model if n_ssm is None else n_ssm
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"S4: n_ssm must divide d_model = {d_model}; got {n_ssm}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"S4: d_state counts conjugate pairs twice and must be even; got {d_state}")
        self.d_model, self.d_state, self.n_ssm = d_model, d_state, n_ssm
        self.mode, self.init, self.rule, self.causal, self.backend = mode, init, rule, not bidirectional, backend
        self.dt_min, self.dt_max, self.lr = dt_min, dt_max, lr
        pairs = d_state // 2
        self.log_A_real = nn.Parameter(torch.empty(n_ssm, pairs))  # A = -exp(log_A_real) + i A_imag
        self.A_imag = nn.Parameter(torch.empty(n_ssm, pairs))
        self.B = nn.Parameter(torch.empty(n_ssm, pairs, 2))
        self.P = nn.Parameter(torch.empty(n_ssm, pairs, 2)) if mode == "dplr" else None
        self.C = nn.Parameter(torch.empty(1 + bidirectional, d_model, pairs, 2))
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.D = nn.Parameter(torch.empty(d_model))
        self.dropout = ChannelDropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start as published: the mode's A, B and C, and steps log-uniform in their range."""
        self.out_proj.reset_parameters()
        A, B = hippo.diagonal(self.init, self.d_state)
        with torch.no_grad():
            self.log_A_real.copy_((-A.real).log().expand_as(self.log_A_real))
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
            self.B.copy_(as_pairs(B).expand_as(self.B))
            if self.P is not None:
                self.P.copy_(as_pairs(hippo.legs(self.d_state)[1]).expand_as(self.P))
            self.C.normal_(std=0.5**0.5)  # complex numbers of variance 1
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
            self.D.normal_()

    @property
    def max_learning_rates(self) -> Mapping[str, float]:
        """For the optimiser: what must not learn faster than this."""
        return {} if self.lr is None else dict.fromkeys(("log_A_real", "A_imag", "B", "P", "log_dt"), self.lr)

    def forward(
        self, x: Tensor, state: S4State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4State | None]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        y, after = self.system(x, state, cu_seqlens=cu_seqlens)
        y = self.out_proj(self.dropout(F.gelu(y), cu_seqlens))
        return F.glu(y, dim=-1), after

    def system(
        self, x: Tensor, state: S4State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4State | None]:
        """The linear part alone: SSM(x)."""
        if not self.causal:
            return self._both_ways(x, state, cu_seqlens), None
        y, h = self._run(x, 0, self.D.to(x.dtype), None if state is None else state.x, cu_seqlens)
        return y, S4State(h)

    @dispatch.keeps_its_precision
    def _run(
        self, x: Tensor, direction: int, D: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One system a channel, its parameters in float32 at least."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        dt = self.log_dt.to(wide).exp()
        A = torch.complex(-self.log_A_real.to(wide).exp(), self.A_imag.to(wide))
        A, B = self._shared(A), self._shared(as_complex(self.B.to(wide)))
        C = self.C[direction].to(wide)
        if self.P is not None:
            P = self._shared(as_complex(self.P.to(wide)))
            return s4(
                x, as_pairs(A), as_pairs(P), as_pairs(B), C, dt, D, state,
                cu_seqlens=cu_seqlens, backend=self.backend,
            )  # fmt: skip
        step = dt.unsqueeze(-1) * A
        if self.rule == "zoh":
            log_A, B = step, torch.expm1(step) / A * B
        else:
            log_A, B = torch.log((1 + step / 2) / (1 - step / 2)), dt.unsqueeze(-1) / (1 - step / 2) * B
        return s4d(x, as_pairs(log_A), as_pairs(B), C, D, state, cu_seqlens=cu_seqlens, backend=self.backend)

    def _shared(self, x: Tensor) -> Tensor:
        """(n_ssm, N / 2) -> (D, N / 2)."""
        return x.repeat(self.d_model // self.n_ssm, 1)

    def _both_ways(self, x: Tensor, state: S4State | None, cu_seqlens: Tensor | None) -> Tensor:
        """One kernel over the present and the past, one over the future, which begins with the next token."""
        if state is not None:
            raise ValueError("S4: a bidirectional layer sees all of a sequence at once and takes no state; got one")
        shard.refuse("A bidirectional S4")
        y, _ = self._run(x, 0, self.D.to(x.dtype), None, cu_seqlens)
        turned = _reversal(x, cu_seqlens)
        future, _ = self._run(x[:, turned], 1, None, None, cu_seqlens)  # of what was turned: the present and the past
        first = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        first[torch.zeros(1, dtype=torch.long, device=x.device) if cu_seqlens is None else _starts(cu_seqlens)] = True
        future = future.roll(1, dims=1).masked_fill(first.view(1, -1, 1), 0)
        return y + future[:, turned]

    def init_state(self, batch: int) -> S4State | None:
        """The state before the first token; None for a bidirectional layer."""
        if not self.causal:
            return None
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        return S4State(torch.zeros(batch, *self.C.shape[1:], dtype=dtype, device=self.C.device))

    def extra_repr(self) -> str:
        """Mode, start and width of the state, for print(model)."""
        both = "" if self.causal else ", bidirectional=True"
        return f"d_state={self.d_state}, mode={self.mode}, init={self.init}, rule={self.rule}, n_ssm={self.n_ssm}{both}"


def _starts(cu_seqlens: Tensor) -> Tensor:
    """Where documents begin that have tokens."""
    return cu_seqlens[:-1][cu_seqlens[1:] > cu_seqlens[:-1]].long()


def _reversal(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For every place the one that takes its turn when each document runs backwards; its own inverse."""
    place = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return place.flip(0)
    ends = (cu_seqlens[1:] + cu_seqlens[:-1] - 1).repeat_interleave(cu_seqlens.diff())
    return ends - place
