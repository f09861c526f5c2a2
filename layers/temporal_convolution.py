"""A temporal convolution network: levels of causal convolutions whose taps stand ever farther apart."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.mixer import Layer
from zoo.ops import causal_conv1d

__all__ = ["TemporalConvolution"]

KINDS = ("depthwise", "separable", "dense")


class DilatedConvolution(Layer):
    """One causal convolution with SiLU, (B, T, D) -> (B, T, D); the state is its last (K - 1) dilation inputs.

    Args:
        d_model: D.
        width: K, taps.
        dilation: steps between them.
        kind: "depthwise", every channel by itself; "separable", the same and a D x D map behind it, before the SiLU;
            "dense", all channels into all, K D^2 numbers.
        weight_norm: the taps of an output channel are a learnt length times a direction (arXiv 1602.07868).
        backend: of zoo.ops.causal_conv1d.
    """

    operators = (causal_conv1d,)

    def __init__(
        self, d_model: int, width: int, *, dilation: int = 1, kind: str = "depthwise", weight_norm: bool = False,
        backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.width, self.dilation, self.kind, self.backend = width, dilation, kind, backend
        inputs = d_model if kind == "dense" else 1
        self.weight = nn.Parameter(torch.empty(d_model, inputs * width))  # dense: tap by tap, its D inputs
        self.bias = nn.Parameter(torch.empty(d_model))
        self.length = nn.Parameter(torch.empty(d_model)) if weight_norm else None
        self.mix = nn.Linear(d_model, d_model, bias=False) if kind == "separable" else None
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """torch's own start for a convolution; biases are zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        if self.length is not None:
            with torch.no_grad():
                self.length.copy_(self.weight.norm(dim=1))

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the inputs before it (B, (K - 1) dilation, D) -> y and the inputs after it."""
        weight = self.weight if self.length is None else F.normalize(self.weight, dim=1) * self.length.unsqueeze(1)
        weight, bias = weight.to(x.dtype), self.bias.to(x.dtype)
        if self.kind == "dense":
            return self._dense(x, weight, bias, state, cu_seqlens)
        y, state = causal_conv1d(
            x, weight, bias, state, activation="silu" if self.mix is None else None, dilation=self.dilation,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return (y if self.mix is None else F.silu(self.mix(y))), state

    def _dense(
        self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """K shifted copies of x side by side, from taps of zeros and a one, then one map K D -> D."""
        D, K = x.shape[2], self.width
        shifts = torch.eye(K, dtype=x.dtype, device=x.device).repeat_interleave(D, dim=0)  # (K D, K)
        copies, after = causal_conv1d(
            x.repeat(1, 1, K), shifts, None, None if state is None else state.repeat(1, 1, K),
            dilation=self.dilation, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return F.silu(F.linear(copies, weight, bias)), after[..., :D].clone()

    def init_state(self, batch: int) -> Tensor:
        """Zeros (batch, (K - 1) dilation, D)."""
        return self.bias.new_zeros(batch, (self.width - 1) * self.dilation, len(self.bias))

    def extra_repr(self) -> str:
        """Channels, taps, dilation and kind, for print(model)."""
        return f"{len(self.bias)}, width={self.width}, dilation={self.dilation}, kind={self.kind}"


class TemporalConvolution(Layer):
    """(B, T, D) -> (B, T, D): silu(h_n + omega * x), h_{i+1} = h_i + conv_i(h_i), h_0 = x.

    Level i has taps f^i steps apart. With m convolutions a level an output sees its own and the R - 1 tokens before it,
    R = 1 + m (K - 1)(1 + f + ... + f^(n-1)).

    Args:
        d_model: D.
        width: K, taps of a convolution.
        growth: f, by which the dilation grows from level to level.
        n_levels: n.
        per_level: m, convolutions of a level.
        kind, weight_norm, backend: as for every convolution, see `DilatedConvolution`.

    Raises:
        ValueError: a size below 1, or an unknown kind.

    Warns: width < growth: some lags are reached by no path of taps.

    Source: arXiv 1803.01271, section 3; arXiv 2312.05605 puts such a network in the place of MEGA's moving average.
    """

    def __init__(
        self, d_model: int, *, width: int = 17, growth: int = 4, n_levels: int = 4, per_level: int = 1,
        kind: str = "depthwise", weight_norm: bool = False, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        sizes = {"width": width, "growth": growth, "n_levels": n_levels, "per_level": per_level}
        if min(sizes.values()) < 1:
            raise ValueError(f"TemporalConvolution: sizes must be at least 1; got {sizes}")
        if kind not in KINDS:
            raise ValueError(f"TemporalConvolution: kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if width < growth and n_levels > 1:
            warnings.warn(
                f"TemporalConvolution: with {width} taps and dilations that grow by {growth} some lags are reached by "
                "no path; width >= growth leaves no holes",
                stacklevel=2,
            )
        self.width, self.growth, self.n_levels, self.per_level = width, growth, n_levels, per_level
        self.levels = nn.ModuleList(
            DilatedConvolution(d_model, width, dilation=growth**i, kind=kind, weight_norm=weight_norm, backend=backend)
            for i in range(n_levels)
            for _ in range(per_level)
        )
        self.omega = nn.Parameter(torch.empty(d_model))
        self.initialise()

    @property
    def receptive_field(self) -> int:
        """R, the tokens that an output sees, its own included."""
        dilations = [int(self.growth**i) for i in range(self.n_levels)]
        return 1 + self.per_level * (self.width - 1) * sum(dilations)

    def initialise(self, n_layers: int = 1) -> None:
        """omega as in MEGA's moving average, N(0, 1); convolutions start by themselves."""
        nn.init.normal_(self.omega)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, D) and the last inputs of each convolution before it -> the output, and those after it."""
        h = made = x
        after: list[Tensor] = []
        for i, conv in enumerate(self._convolutions()):
            made, tail = conv(made, None if state is None else state[i], cu_seqlens=cu_seqlens)
            after.append(tail)
            if (i + 1) % self.per_level == 0:  # the level ends
                h = made = h + made
        return F.silu(torch.addcmul(h, self.omega.to(x.dtype), x)), tuple(after)

    def _convolutions(self) -> Iterator[DilatedConvolution]:
        """Those of all levels, with their type."""
        for conv in self.levels:
            assert isinstance(conv, DilatedConvolution)
            yield conv

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zeros, R - 1 rows over all convolutions."""
        return tuple(conv.init_state(batch) for conv in self._convolutions())
