"""Mamba and Mamba-2: selective state spaces behind a short convolution and a gate."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import ShortConvolution
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.time_segments import in_segments
from zoo.ops import selective_scan, ssd, swiglu

__all__ = ["Mamba", "Mamba2"]


class MambaState(NamedTuple):
    """h: (B, E, N), for Mamba-2 (B, H, N, P), float32; conv: the last width - 1 inputs of the convolution."""

    h: Tensor
    conv: Tensor


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def step_sizes(like: Tensor, dt_min: float = 1e-3, dt_max: float = 1e-1, dt_floor: float = 1e-4) -> Tensor:
    """Log-uniform in [dt_min, dt_max], as what softplus makes them of."""
    dt = torch.empty_like(like).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_min_(dt_floor)
    return _inverse_softplus(dt)


class _StepProjection(nn.Linear):
    """W x + b, with b added in float32 where x is narrower: the bias says more than bfloat16 holds."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.dtype == wide:
            return super().forward(x)
        return F.linear(x, self.weight).to(wide) + self.bias.to(wide)


def _initialise_projections(modules: tuple[nn.Module, ...], out_proj: nn.Linear, n_layers: int) -> None:
    """torch's own ranges, and an output that shrinks with depth, one residual branch a layer."""
    for module in modules:
        module.reset_parameters()  # type: ignore[operator]
    nn.init.kaiming_uniform_(out_proj.weight, a=math.sqrt(5))
    with torch.no_grad():
        out_proj.weight /= math.sqrt(n_layers)


@register_mixer("mamba")
class Mamba(Mixer):
    """Mamba's mixer, (B, T, D) -> (B, T, D): y = W_o (S6(silu(conv(x))) * silu(z)), with x, z = W_i input.

    The scan's step size, input map and output map are linear in silu(conv(x)), token by token.

    Args:
        d_model: D.
        d_state: N, states per channel.
        expand: E / D.
        d_conv: width of the short convolution.
        dt_rank: rank of the map to the step sizes; ceil(D / 16) when omitted.
        selective: False for constant step size and maps: the same block around a time-invariant system.
        backend: of zoo.ops.selective_scan and the convolution.

    Source: arXiv 2312.00752, section 3; the input is discretised by Euler's rule, as in the official code.
    """

    operators = (selective_scan, swiglu)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        selective: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if not selective and dt_rank is not None:
            raise ValueError(
                f"Mamba: dt_rank is that of the map to the step sizes, and selective=False has none; got {dt_rank}, "
                "leave it out"
            )
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = -(-d_model // 16) if dt_rank is None else dt_rank
        self.selective, self.backend = selective, backend
        E, N, R = self.d_inner, d_state, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * E, bias=False)  # [x, z]
        self.conv1d = ShortConvolution(E, d_conv, bias=True, backend=backend)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False) if selective else None  # [dt, B, C]
        self.dt_proj = _StepProjection(R, E) if selective else None
        self.constant = (
            None if selective else nn.ParameterDict({"dt": torch.empty(E), "B": torch.empty(N), "C": torch.empty(N)})
        )
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, d_model, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The published start: A = -1 ... -N in every channel, steps log-uniform in [0.001, 0.1]."""
        _initialise_projections((self.in_proj, self.conv1d), self.out_proj, n_layers)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, self.d_state + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)
            if self.x_proj is not None and self.dt_proj is not None:
                self.x_proj.reset_parameters()
                self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
                self.dt_proj.bias.copy_(step_sizes(self.dt_proj.bias))
            if self.constant is not None:
                self.constant["dt"].copy_(step_sizes(self.constant["dt"]))
                self.constant["B"].normal_()
                self.constant["C"].normal_()

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        if cu_seqlens is not None or x.shape[1] == 1:
            return self._mix(x, state, cu_seqlens)
        return in_segments(self._mix, x, state, width=2 * self.d_inner)

    def _mix(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, MambaState]:
        h, tail = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        x, tail = self.conv1d(x, tail, cu_seqlens=cu_seqlens)
        delta, B, C = self._selection(x)
        wide = delta.dtype
        A = self.A_log.to(wide).exp()
        A = -A if torch.is_grad_enabled() else A.neg_()
        y, h = selective_scan(
            x, delta, A, B, C, self.D.to(wide), h, cu_seqlens=cu_seqlens, backend=self.backend
        )  # fmt: skip
        return self.out_proj(swiglu(z, y, backend=self.backend)), MambaState(h, tail)

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (B, T, E), in float32 at least, and the maps B, C (B, T, N)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.x_proj is not None and self.dt_proj is not None:
            dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
            return F.softplus(self.dt_proj(dt).to(wide)), B.to(x.dtype), C.to(x.dtype)
        assert self.constant is not None
        delta = F.softplus(self.constant["dt"].to(wide)).expand(*x.shape)
        B, C = (self.constant[name].to(x.dtype).expand(*x.shape[:2], -1) for name in "BC")
        return delta, B, C

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        h = torch.zeros(batch, self.d_inner, self.d_state, dtype=dtype, device=self.D.device)
        return MambaState(h, self.conv1d.init_state(batch))

    def extra_repr(self) -> str:
        """Widths and options, for print(model)."""
        return f"d_inner={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}, selective={self.selective}"


@register_mixer("mamba2")
class Mamba2(Mixer):
    """Mamba-2's mixer, (B, T, D) -> (B, T, D): one decay per head, y = W_o RMSNorm(SSD(silu(conv(x B C))) * silu(z)).

    Args:
        d_model: D.
        d_state: N, rows of a head's memory.
        expand: E / D.
        head_dim: P; E / P heads.
        n_groups: G, groups of heads that share B and C, each with its own norm.
        d_conv: width of the short convolution over x, B and C.
        norm_eps: of the gated norm.
        backend: of zoo.ops.ssd and the convolution.

    Source: arXiv 2405.21060, section 7.
    """

    operators = (ssd,)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        d_conv: int = 4,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.d_inner, self.d_state, self.head_dim, self.n_groups = expand * d_model, d_state, head_dim, n_groups
        if self.d_inner % head_dim:
            raise ValueError(f"Mamba2: head_dim must divide expand * d_model = {self.d_inner}; got {head_dim}")
        self.n_heads = self.d_inner // head_dim
        if self.n_heads % n_groups:
            raise ValueError(f"Mamba2: n_groups must divide the {self.n_heads} heads; got {n_groups}")
        self.backend = backend
        E, GN, H = self.d_inner, n_groups * d_state, self.n_heads
        self.in_proj = nn.Linear(d_model, 2 * E + 2 * GN + H, bias=False)  # [z, x, B, C, dt]
        self.conv1d = ShortConvolution(E + 2 * GN, d_conv, bias=True, backend=backend)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GatedRMSNorm(E, eps=norm_eps, order="gate_first", groups=n_groups)
        self.out_proj = nn.Linear(E, d_model, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The published start: A uniform in [-16, -1], steps log-uniform in [0.001, 0.1]."""
        _initialise_projections((self.in_proj, self.conv1d), self.out_proj, n_layers)
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0).log_()
            self.dt_bias.copy_(step_sizes(self.dt_bias))
            self.D.fill_(1.0)

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        S, tail = (None, None) if state is None else state
        E, GN, H = self.d_inner, self.n_groups * self.d_state, self.n_heads
        z, mixed, dt = self.in_proj(x).split((E, E + 2 * GN, H), dim=-1)
        mixed, tail = self.conv1d(mixed, tail, cu_seqlens=cu_seqlens)
        x, B, C = mixed.split((E, GN, GN), dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        y, S = ssd(
            x.unflatten(-1, (H, self.head_dim)), dt, -self.A_log.to(wide).exp(),
            B.unflatten(-1, (self.n_groups, self.d_state)), C.unflatten(-1, (self.n_groups, self.d_state)),
            self.D.to(wide), S, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2), z)), MambaState(S, tail)

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        S = torch.zeros(batch, self.n_heads, self.d_state, self.head_dim, dtype=dtype, device=self.D.device)
        return MambaState(S, self.conv1d.init_state(batch))

    def extra_repr(self) -> str:
        """Widths, heads and groups, for print(model)."""
        return f"d_inner={self.d_inner}, d_state={self.d_state}, head_dim={self.head_dim}, n_groups={self.n_groups}"
