"""pLSTM on a line: source, transition and mark gates in place of input, forget and output gates."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import ShortConvolution
from zoo.layers.mixer import Layer, Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import RMSNorm
from zoo.ops import plstm

__all__ = ["PLSTM", "HeadwiseGate"]

SOURCE, TRANSITION, DIRECT = -4.0, 1.0, -6.0  # biases that gates start from: the official code's; the mark's is -4


class HeadwiseGate(Layer):
    """A number for each of n gates, (..., D) -> (..., n): gate f sees only the f-th of n slices of the input.

    Args:
        d_model: D, a multiple of n.
        n: gates.
        bias: where the biases start.
        std: standard deviation from which the weights start, 0 for gates that know no input at first; None for no
            weights at all.

    Source: the official code's `sub_heads`; the weights of a dense map that are off the blocks are not there.
    """

    def __init__(self, d_model: int, n: int, *, bias: float, std: float | None = 0.0):
        super().__init__()
        if d_model % n:
            raise ValueError(f"HeadwiseGate: the number of gates must divide d_model = {d_model}; got {n}")
        self.start, self.std = bias, std
        self.bias = nn.Parameter(torch.empty(n))
        self.weight = None if std is None else nn.Parameter(torch.empty(n, d_model // n))
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Biases at their start, weights at 0 or normal."""
        nn.init.constant_(self.bias, self.start)
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.std or 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., n), float32 at least, of inputs (..., D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = self.bias.to(wide)
        if self.weight is None:
            return bias + bias.new_zeros(*x.shape[:-1], 1)  # no view: counters of operations cannot hook one
        slices = x.unflatten(-1, self.weight.shape).to(wide)
        logits: Tensor = (slices * self.weight.to(wide)).sum(-1) + bias
        return logits

    def extra_repr(self) -> str:
        """The number of gates, and what each sees, for print(model)."""
        return f"{len(self.bias)}, sees={0 if self.weight is None else self.weight.shape[1]}, bias={self.start}"


class PLSTMState(NamedTuple):
    """memory: (B, H, K, V) float32; conv: the tail of the convolution, (B, conv_size - 1, E)."""

    memory: Tensor
    conv: Tensor


@register_mixer("plstm")
class PLSTM(Mixer):
    """pLSTM's mixer for sequences, (B, T, D) -> (B, T, D), between an up- and a down-projection with a SiLU gate.

    u, z = W_up x; c = silu(conv(u)); queries, keys and all gates come from c, values from u:
    C_t = T_t C_{t-1} + S_t k_t v_t^T, h_t = q_t^T (M_t C_{t-1} + D_t k_t v_t^T) / sqrt(K),
    y = W_down ((RMSNorm(h) + p * c) * silu(z)), where p is one number a channel.
    S, M and D are sigmoids. T = tanh(5 a) may be negative, so that a head can count modulo 2.

    Args:
        d_model: D.
        n_heads: H.
        expand: E / D, E the width inside.
        conv_size: width of the short convolution.
        norm_eps: of the norm of every head's output.
        gate_std: standard deviation from which the gates' weights start.
        backend: of the operator and the convolution.

    Source: arXiv 2506.11997, section 4.1 and appendix; one transition a head (JT = 1), where the authors' variant for
    language has 4 x 4 matrices.
    """

    operators = (plstm,)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand: int = 2,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        gate_std: float = 0.02,
        backend: str = "auto",
    ):
        super().__init__()
        E = expand * d_model
        if E % n_heads:
            raise ValueError(f"PLSTM: n_heads must divide expand * d_model = {E}; got {n_heads}")
        self.n_heads, self.head_dim, self.backend = n_heads, E // n_heads, backend
        self.up_proj = nn.Linear(d_model, 2 * E, bias=False)
        self.conv = ShortConvolution(E, conv_size, backend=backend)
        self.q_proj = nn.Linear(E, E, bias=False)
        self.k_proj = nn.Linear(E, E, bias=False)
        self.source = HeadwiseGate(E, n_heads, bias=SOURCE, std=gate_std)
        self.transition = HeadwiseGate(E, n_heads, bias=TRANSITION, std=gate_std)
        self.mark = HeadwiseGate(E, n_heads, bias=SOURCE, std=gate_std)
        self.direct = HeadwiseGate(E, n_heads, bias=DIRECT, std=gate_std)
        self.norm = RMSNorm(self.head_dim, eps=norm_eps)
        self.passthrough = nn.Parameter(torch.ones(E))
        self.down_proj = nn.Linear(E, d_model, bias=False)

    def forward(
        self, x: Tensor, state: PLSTMState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, PLSTMState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        memory, tail = (None, None) if state is None else state
        u, z = self.up_proj(x).chunk(2, dim=-1)  # each (B, T, E)
        c, tail = self.conv(u, tail, cu_seqlens=cu_seqlens)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in (self.q_proj(c), self.k_proj(c), u))
        h, memory = plstm(
            q, k, v, self.source(c).sigmoid(), torch.tanh(5 * self.transition(c)), self.mark(c).sigmoid(),
            self.direct(c).sigmoid(), memory, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        inner = torch.addcmul(self.norm(h).flatten(2), c, self.passthrough.to(c.dtype)) * F.silu(z)
        return self.down_proj(inner), PLSTMState(memory, tail)

    def init_state(self, batch: int) -> PLSTMState:
        """The state before the first token: zeros for the memory and the convolution."""
        weight, K = self.down_proj.weight, self.head_dim
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = torch.zeros(batch, self.n_heads, K, K, dtype=dtype, device=weight.device)
        return PLSTMState(memory, self.conv.init_state(batch))
