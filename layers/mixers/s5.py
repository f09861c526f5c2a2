"""S5: one state space with many inputs and outputs, run as a scan, with resets for episodes."""

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
from zoo.ops import complex_affine_scan
from zoo.ops.core import dispatch
from zoo.ops.core.pairs import as_complex, as_pairs

__all__ = ["S5"]

GATES = ("full_glu", "half_glu1", "half_glu2", "none")


class S5State(NamedTuple):
    """x: (B, P, 2), one of each pair of complex states, float32."""

    x: Tensor


@register_mixer("s5")
class S5(Mixer):
    """S5's layer, (B, T, D) -> (B, T, D): y = gate(dropout(gelu(SSM(x)))), all channels through one system.

    x_t = exp(dt A) x_{t-1} + [(exp(dt A) - 1) / A * B] u_t, y_t = 2 Re(C x_t) + D * u_t, with A diagonal.

    Args:
        d_model: D.
        d_state: real states, in P = d_state / 2 conjugate pairs.
        blocks: A starts as so many equal HiPPO blocks; divides P.
        gate: "full_glu" (out1(y) * sigmoid(out2(y))), "half_glu1" (the same with y before its activation in the place
            of out1), "half_glu2" (y * sigmoid(out2(y))) or "none".
        clip: keep the real part of A at most -1e-4, for lengths that were not trained.
        dt_min, dt_max: steps, one per state, are log-uniform between them.
        dropout: of whole channels of a sequence, the same at all times.
        lr: the system's own learning rate where the optimiser's is larger: of A, B and dt. None for no limit.
        backend: of zoo.ops.complex_affine_scan.

    Source: arXiv 2208.04933, sections 3 and 4; resets: arXiv 2303.03982, section 3.
    """

    operators = (complex_affine_scan,)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        blocks: int = 1,
        gate: str = "half_glu2",
        clip: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dropout: float = 0.0,
        lr: float | None = 1e-3,
        backend: str = "auto",
    ):
        super().__init__()
        if d_state < 2 or d_state % 2 or blocks < 1 or d_state % (2 * blocks):
            raise ValueError(f"S5: d_state must be a multiple of 2 * blocks = {2 * blocks}; got {d_state}")
        if gate not in GATES:
            raise ValueError(f"S5: gate must be one of {', '.join(GATES)}; got {gate!r}")
        self.d_state, self.blocks, self.gate, self.clip = d_state, blocks, gate, clip
        self.dt_min, self.dt_max, self.lr, self.backend = dt_min, dt_max, lr, backend
        P = d_state // 2
        self.A = nn.Parameter(torch.empty(P, 2))
        self.B = nn.Parameter(torch.empty(P, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, P, 2))
        self.log_dt = nn.Parameter(torch.empty(P))
        self.D = nn.Parameter(torch.empty(d_model))
        self.dropout = ChannelDropout(dropout)
        self.out1 = nn.Linear(d_model, d_model) if gate == "full_glu" else None
        self.out2 = nn.Linear(d_model, d_model) if gate != "none" else None
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The published start: B = V^* times a Lecun-normal matrix, C = a Lecun-normal matrix times V."""
        for out in (self.out1, self.out2):
            if out is not None:
                out.reset_parameters()
        P, H = self.B.shape[:2]
        A, _, _, V = hippo.legs(self.d_state // self.blocks)
        V = torch.block_diag(*[V] * self.blocks)  # (2P, P)
        B = torch.randn(2 * P, H, dtype=torch.float64, device="cpu") * H**-0.5
        C = torch.randn(H, 2 * P, dtype=torch.float64, device="cpu") * (2 * P) ** -0.5
        with torch.no_grad():
            self.A.copy_(as_pairs(A.repeat(self.blocks)))
            self.B.copy_(as_pairs(V.mH @ B.to(V.dtype)))
            self.C.copy_(as_pairs(C.to(V.dtype) @ V))
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
            self.D.normal_()

    @property
    def max_learning_rates(self) -> Mapping[str, float]:
        """For the optimiser: what must not learn faster than this."""
        return {} if self.lr is None else dict.fromkeys(("A", "B", "log_dt"), self.lr)

    def forward(
        self, x: Tensor, state: S5State | None = None, *, resets: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S5State]:
        """As every mixer; `resets` (B, T) bool are true where an episode begins: the state before is dropped."""
        y, state = self.system(x, state, resets=resets, cu_seqlens=cu_seqlens)
        activated = self.dropout(F.gelu(y), cu_seqlens)
        if self.out2 is None:
            return activated, state
        if self.out1 is not None:
            return self.out1(activated) * self.out2(activated).sigmoid(), state
        return (y if self.gate == "half_glu1" else activated) * self.out2(activated).sigmoid(), state

    @dispatch.keeps_its_precision
    def system(
        self, x: Tensor, state: S5State | None = None, *, resets: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S5State]:
        """The linear part alone, in float32 at least."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        real = self.A[:, 0].to(wide)
        A = torch.complex(real.clamp_max(-1e-4) if self.clip else real, self.A[:, 1].to(wide))
        step = self.log_dt.to(wide).exp() * A
        B = as_pairs((torch.expm1(step) / A).unsqueeze(-1) * as_complex(self.B.to(wide)))  # (P, D, 2)
        a = as_pairs(step.exp()).view(1, 1, -1, 2)
        # complex products with real inputs and for real outputs are two real ones
        b = F.linear(x.to(wide), B.movedim(-1, 1).flatten(0, 1)).unflatten(-1, (-1, 2))  # (B, T, P, 2)
        h, last = complex_affine_scan(
            a, b, None if state is None else state.x, resets=resets, cu_seqlens=cu_seqlens, backend=self.backend
        )
        C = torch.stack([2 * self.C[..., 0], -2 * self.C[..., 1]], dim=-1).to(wide)  # (D, P, 2)
        y = F.linear(h.flatten(-2), C.flatten(-2)) + self.D.to(wide) * x.to(wide)
        return y.to(x.dtype), S5State(last)

    def init_state(self, batch: int) -> S5State:
        """The state before the first token."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return S5State(torch.zeros(batch, *self.A.shape, dtype=dtype, device=self.A.device))

    def extra_repr(self) -> str:
        """Width of the state, blocks, gate and clip, for print(model)."""
        return f"d_state={self.d_state}, blocks={self.blocks}, gate={self.gate}, clip={self.clip}"
