"""Hydra: a bidirectional state space mixer, quasiseparable mixing behind a two-sided convolution and a gate."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import DepthwiseConvolution
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.mixers.mamba import step_sizes
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.state import refuse_state
from zoo.ops import quasiseparable

__all__ = ["Hydra"]


@register_mixer("hydra")
class Hydra(Mixer):
    """Hydra's mixer, (B, T, D) -> (B, T, D): y = W_o (RMSNorm(QS(silu(conv(x B C)))) * silu(z)), over both sides.

    Both directions share x, the rates A and the bias of the step sizes; each has its own B, C and step sizes. The
    diagonal is W_d x + D, one number a token and head. It sees the future, so it is no mixer of a causal model
    (`causal` is False), and it carries no state.

    Args:
        d_model: D.
        d_state: N, rows of a head's memory in each direction.
        expand: E / D.
        head_dim: P; E / P heads.
        n_groups: G, groups of heads that share B and C.
        d_conv: width of the convolution over x, B and C, half of it on either side.
        norm_eps: of the gated norm.
        backend: of zoo.ops.quasiseparable and the convolution.

    Source: arXiv 2407.09941, section 3.
    """

    causal = False
    operators = (quasiseparable,)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        d_conv: int = 7,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.d_inner, self.d_state, self.head_dim, self.n_groups = expand * d_model, d_state, head_dim, n_groups
        if self.d_inner % head_dim:
            raise ValueError(f"Hydra: head_dim must divide expand * d_model = {self.d_inner}; got {head_dim}")
        self.n_heads = self.d_inner // head_dim
        if self.n_heads % n_groups:
            raise ValueError(f"Hydra: n_groups must divide the {self.n_heads} heads; got {n_groups}")
        self.backend = backend
        E, GN, H = self.d_inner, n_groups * d_state, self.n_heads
        self.in_proj = nn.Linear(d_model, 2 * E + 4 * GN + 2 * H, bias=False)  # [z, x, (B, C), (B, C), dt, dt]
        self.conv1d = DepthwiseConvolution(E + 4 * GN, d_conv, bias=True, backend=backend)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.fc_D = nn.Linear(E, H, bias=False)
        self.norm = GatedRMSNorm(E, eps=norm_eps)
        self.out_proj = nn.Linear(E, d_model, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The published start: A = -1, D = 1, steps log-uniform in [0.001, 0.1]; linear layers are the model's."""
        with torch.no_grad():
            self.A_log.zero_()
            self.dt_bias.copy_(step_sizes(self.dt_bias))
            self.D.fill_(1.0)

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """(y, None): there is no state to hand on, and none is taken."""
        refuse_state("Hydra", state)
        E, GN, H = self.d_inner, self.n_groups * self.d_state, self.n_heads
        z, mixed, dt = self.in_proj(x).split((E, E + 4 * GN, 2 * H), dim=-1)
        x, BC = self.conv1d(mixed, cu_seqlens=cu_seqlens).split((E, 4 * GN), dim=-1)
        B, C = BC.unflatten(-1, (2, 2, self.n_groups, self.d_state)).unbind(3)  # each (B, T, 2, G, N)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.unflatten(-1, (2, H)).to(wide) + self.dt_bias.to(wide))
        diagonal = self.fc_D(x).to(wide) + self.D.to(wide)
        y = quasiseparable(
            x.unflatten(-1, (H, self.head_dim)), dt, -self.A_log.to(wide).exp(), B, C, diagonal,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2), z)), None

    def extra_repr(self) -> str:
        """Widths, heads and groups, for print(model)."""
        return f"d_inner={self.d_inner}, d_state={self.d_state}, head_dim={self.head_dim}, n_groups={self.n_groups}"
