"""DeltaNet and Gated DeltaNet: a matrix memory that writes corrections instead of sums."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import ShortConvolution, initial_tails, side_by_side
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import GatedRMSNorm, RMSNorm, l2_norm
from zoo.ops import delta_rule

__all__ = ["DeltaNet", "GatedDeltaNet"]


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _sum_norm(x: Tensor) -> Tensor:
    return x / (x.sum(dim=-1, keepdim=True) + 1e-6)


def _identity(x: Tensor) -> Tensor:
    return x


# Functions with names of a module: what a layer holds must be picklable, and a lambda is not.
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": _elu_plus_one,
    "identity": _identity,
}
NORMS = {"l2": l2_norm, "sum": _sum_norm, "none": _identity}


class DeltaNetState(NamedTuple):
    """memory: (B, H, K, V) float32; convs: the tails of the convolutions of q, k, v, empty without them."""

    memory: Tensor
    convs: tuple[Tensor, ...]


class _DeltaMixer(Mixer):
    """What both layers share: activated streams of q, k and v, the memory, the output projection."""

    operators = (delta_rule,)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_v_heads: int,
        head_k: int,
        head_v: int,
        conv_size: int | None,
        qk_activation: str,
        backend: str,
    ):
        super().__init__()
        if min(n_heads, n_v_heads, head_k, head_v) < 1:
            raise ValueError(
                f"{type(self).__name__}: heads, and the keys and values of each, must be at least 1; got {n_heads} "
                f"heads of {head_k} and {n_v_heads} of {head_v}"
            )
        if n_v_heads % n_heads:
            raise ValueError(f"n_v_heads must be a multiple of n_heads = {n_heads}; got {n_v_heads}")
        self.n_heads, self.n_v_heads, self.head_k, self.head_v = n_heads, n_v_heads, head_k, head_v
        self.backend = backend
        sizes = (n_heads * head_k, n_heads * head_k, n_v_heads * head_v)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, size, bias=False) for size in sizes)
        self.o_proj = nn.Linear(n_v_heads * head_v, d_model, bias=False)
        activations = [qk_activation, qk_activation, "silu"]
        self.convs = nn.ModuleList()
        if conv_size is not None:
            for i, size in enumerate(sizes):
                fused = "silu" if activations[i] == "silu" else None
                self.convs.append(ShortConvolution(size, conv_size, activation=fused, backend=backend))
                activations[i] = "identity" if fused else activations[i]
        self.features = tuple(FEATURES[name] for name in activations)

    def _streams(
        self, x: Tensor, state: DeltaNetState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
        """q, k (B, T, H, K) and v (B, T, Hv, V), convolved and activated; the memory; the new tails."""
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        memory, tails = (None, ()) if state is None else state
        streams, tails = side_by_side(self.convs, streams, tails, cu_seqlens=cu_seqlens)
        q, k, v = (feature(stream) for feature, stream in zip(self.features, streams, strict=True))
        q, k = q.unflatten(-1, (self.n_heads, self.head_k)), k.unflatten(-1, (self.n_heads, self.head_k))
        return q, k, v.unflatten(-1, (self.n_v_heads, self.head_v)), memory, tails

    def init_state(self, batch: int) -> DeltaNetState:
        weight = self.o_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        memory = torch.zeros(batch, self.n_v_heads, self.head_k, self.head_v, dtype=dtype, device=weight.device)
        return DeltaNetState(memory, initial_tails(self.convs, batch))


@register_mixer("deltanet")
class DeltaNet(_DeltaMixer):
    """DeltaNet's mixer, (B, T, D) -> (B, T, D): S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T.

    Args:
        d_model: D.
        n_heads: H; the published models use heads of 128.
        expand_k, expand_v: H * K and H * V as multiples of D.
        conv_size: width of the short convolutions on q, k, v, or None.
        qk_activation: "silu", "relu", "elu" (1 + elu) or "identity", on q and k.
        qk_norm: "l2", "sum" or "none". The L2 norm keeps every transition non-expansive.
        use_beta: write strength sigmoid(x W); 1 otherwise.
        allow_neg_eigval: write strength in (0, 2): transitions can reflect, as parity needs. Needs use_beta.
        use_gate: gate the normalised output by silu(x W); needs use_output_norm.
        use_output_norm: RMSNorm over each head's output.
        norm_eps: of the output norm.
        backend: of zoo.ops.delta_rule.

    Source: arXiv 2406.06484, section 3; arXiv 2411.12537 for the eigenvalues.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int | None = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        use_beta: bool = True,
        allow_neg_eigval: bool = False,
        use_gate: bool = False,
        use_output_norm: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        key_dim, value_dim = int(d_model * expand_k), int(d_model * expand_v)
        if n_heads < 1 or key_dim % n_heads or value_dim % n_heads:
            raise ValueError(
                f"DeltaNet: n_heads must divide expand_k * d_model and expand_v * d_model; "
                f"got {n_heads} heads for {key_dim} and {value_dim}"
            )
        if qk_activation not in FEATURES or qk_norm not in NORMS:
            raise ValueError(
                f"DeltaNet: qk_activation is one of {', '.join(FEATURES)} and qk_norm one of {', '.join(NORMS)}; "
                f"got {qk_activation!r} and {qk_norm!r}"
            )
        if use_gate and not use_output_norm:
            raise ValueError(
                "DeltaNet: use_gate gates the normalised output, so it needs use_output_norm; got "
                "use_output_norm=False, set it to true or use_gate to false"
            )
        if allow_neg_eigval and not use_beta:
            raise ValueError(
                "DeltaNet: allow_neg_eigval widens the range of the learnt write strength, and use_beta=False has "
                "none; set use_beta to true or allow_neg_eigval to false"
            )
        super().__init__(
            d_model, n_heads=n_heads, n_v_heads=n_heads, head_k=key_dim // n_heads, head_v=value_dim // n_heads,
            conv_size=conv_size, qk_activation=qk_activation, backend=backend,
        )  # fmt: skip
        self.qk_norm = NORMS[qk_norm]
        self.beta_range = 2.0 if allow_neg_eigval else 1.0
        self.b_proj = nn.Linear(d_model, n_heads, bias=False) if use_beta else None
        self.g_proj = nn.Linear(d_model, value_dim, bias=False) if use_gate else None
        norm = GatedRMSNorm if use_gate else RMSNorm
        self.o_norm = norm(self.head_v, eps=norm_eps) if use_output_norm else None

    def forward(
        self, x: Tensor, state: DeltaNetState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DeltaNetState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        q, k, v, memory, tails = self._streams(x, state, cu_seqlens)
        q, k = self.qk_norm(q), self.qk_norm(k)
        beta = torch.ones_like(v[..., 0]) if self.b_proj is None else self.beta_range * self.b_proj(x).sigmoid()
        o, memory = delta_rule(q, k, v, beta, state=memory, cu_seqlens=cu_seqlens, backend=self.backend)
        if self.g_proj is not None and self.o_norm is not None:
            o = self.o_norm(o, self.g_proj(x).view_as(o))
        elif self.o_norm is not None:
            o = self.o_norm(o)
        return self.o_proj(o.flatten(2)), DeltaNetState(memory, tails)


@register_mixer("gated_deltanet")
class GatedDeltaNet(_DeltaMixer):
    """Gated DeltaNet's mixer: the memory decays by exp(g_t) before the delta rule writes.

    g_t = -exp(A_log) * softplus(x W + dt_bias), one number per value head and step, in float32.

    Args:
        d_model: D.
        n_heads: heads of q and k.
        n_v_heads: heads of v, beta and g, a multiple of n_heads; n_heads when omitted.
        head_dim: K. A rule of thumb: n_heads * head_dim = 0.75 D.
        expand_v: V / K.
        conv_size: width of the short convolutions on q, k, v, or None.
        allow_neg_eigval: write strength in (0, 2).
        use_gate: gate the normalised output by silu(x W).
        norm_eps: of the output norm.
        backend: of zoo.ops.delta_rule.

    Source: arXiv 2412.06464, section 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 6,
        n_v_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        conv_size: int | None = 4,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        n_v_heads = n_heads if n_v_heads is None else n_v_heads
        super().__init__(
            d_model, n_heads=n_heads, n_v_heads=n_v_heads, head_k=head_dim, head_v=int(head_dim * expand_v),
            conv_size=conv_size, qk_activation="silu", backend=backend,
        )  # fmt: skip
        self.beta_range = 2.0 if allow_neg_eigval else 1.0
        self.b_proj = nn.Linear(d_model, n_v_heads, bias=False)
        self.a_proj = nn.Linear(d_model, n_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_v_heads))
        self.g_proj = nn.Linear(d_model, n_v_heads * self.head_v, bias=False) if use_gate else None
        self.o_norm = (GatedRMSNorm if use_gate else RMSNorm)(self.head_v, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in (0, 16); dt log-uniform in [1e-3, 1e-1]: the ranges of Mamba-2."""
        with torch.no_grad():
            self.A_log.uniform_(1e-4, 16).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_min_(1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(
        self, x: Tensor, state: DeltaNetState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DeltaNetState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        q, k, v, memory, tails = self._streams(x, state, cu_seqlens)
        q, k = l2_norm(q), l2_norm(k)
        if self.n_v_heads != self.n_heads:
            q, k = (z.repeat_interleave(self.n_v_heads // self.n_heads, dim=2) for z in (q, k))
        beta = self.beta_range * self.b_proj(x).sigmoid()
        dtype = torch.promote_types(x.dtype, torch.float32)
        g = -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        o, memory = delta_rule(q, k, v, beta, g, memory, cu_seqlens=cu_seqlens, backend=self.backend)
        o = self.o_norm(o, self.g_proj(x).view_as(o)) if self.g_proj is not None else self.o_norm(o)
        return self.o_proj(o.flatten(2)), DeltaNetState(memory, tails)
