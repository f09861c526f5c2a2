"""ViG's mixer: a 3 x 3 convolution sees the neighbours, bidirectional gated linear attention the whole picture."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.mixer import Mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.state import refuse_state
from zoo.ops import bidirectional_gla, rms_norm, shard

__all__ = ["ViG"]

LOW_RANK, TEMPERATURE = 16, 16.0  # of the decay gates: as in GLA


class ViG(Mixer):
    """Patches of a picture, row by row, (B, N, D) -> (B, N, D): s * RMSNorm(y) + (1 - s) * RMSNorm(u), projected.

    u is a depthwise 3 x 3 convolution of x over the grid, y is bidirectional gated linear attention of u, and the gate
    s = sigmoid(W u + b) mixes what is far with what is near. Both directions share queries, keys and values; decays
    are a direction's own. It sees both sides, so it is no mixer of a causal model, and it carries no state.

    Args:
        d_model: D.
        n_heads: H, divides D; a head has D / H values and half as many keys.
        conv: whether there is the convolution; without it u is x.
        activation: SiLU behind the convolution and before the projection, as in the smallest model of the paper.
        xavier: projections start as the plain models of the paper do; else they start as the model's other layers.
        norm_eps: of both norms, over the values of a head.
        backend: of zoo.ops.bidirectional_gla.

    Raises:
        ValueError: D / H is not a positive even number.

    Source: arXiv 2405.18425, section 3.
    """

    causal = False
    operators = (bidirectional_gla, rms_norm)
    takes = ("grid",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        conv: bool = True,
        activation: bool = False,
        xavier: bool = True,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"ViG: d_model must be a multiple of twice n_heads; got {d_model} and {n_heads}")
        self.n_heads, self.activation, self.xavier, self.backend = n_heads, activation, xavier, backend
        self.keys = d_model // 2
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model, bias=False) if conv else None
        self.qkv_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.decay_proj = nn.Sequential(
            nn.Linear(d_model, LOW_RANK, bias=False), nn.Linear(LOW_RANK, 2 * self.keys)
        )  # fmt: skip
        self.gate_proj = nn.Linear(d_model, d_model)
        self.far_norm, self.near_norm = (RMSNorm(d_model // n_heads, eps=norm_eps) for _ in range(2))
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Xavier's uniform start with the gain 2^-2.5: of the convolution always, of the projections if `xavier`."""
        projections = [m.weight for m in self.modules() if isinstance(m, nn.Linear)] if self.xavier else []
        for weight in [*projections, *([] if self.conv is None else [self.conv.weight])]:
            nn.init.xavier_uniform_(weight, gain=2**-2.5)

    def forward(self, x: Tensor, state: Any = None, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, None]:
        """(y, None): there is no state to hand on, and none is taken.

        Args:
            x: (B, rows x columns, D).
            state: None.
            grid: rows and columns of the patches.

        Raises:
            ValueError: no grid, or one of another number of patches.
        """
        refuse_state("ViG", state)
        u = self._near(x, grid)
        q, k, v = (
            z.unflatten(-1, (self.n_heads, -1)) for z in self.qkv_proj(u).split((self.keys, self.keys, x.shape[2]), -1)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        g = F.logsigmoid(self.decay_proj(u).to(wide)).unflatten(-1, (2, self.n_heads, -1)) / TEMPERATURE
        y = bidirectional_gla(q, k, v, g, backend=self.backend)
        gate = self.gate_proj(u).sigmoid().view_as(y)
        o = torch.lerp(self.near_norm(u.view_as(y)), self.far_norm(y), gate).flatten(2)
        return self.o_proj(F.silu(o) if self.activation else o), None

    def _near(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """What every patch knows of the eight around it."""
        if self.conv is None:
            return x
        shard.refuse("A convolution over rows and columns")
        if grid is None or grid[0] * grid[1] != x.shape[1]:
            raise ValueError(
                f"ViG sees a picture: it needs the rows and columns of its {x.shape[1]} patches; got grid = {grid}"
            )
        u = self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return F.silu(u) if self.activation else u

    def extra_repr(self) -> str:
        """Heads and options, for print(model)."""
        return f"n_heads={self.n_heads}, activation={self.activation}"
