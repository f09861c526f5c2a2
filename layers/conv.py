"""The short convolution in front of a mixer: causal with a state, or over both sides."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zoo.ops import causal_conv1d, depthwise_conv1d


class _Taps(nn.Module):
    """The parameters of a depthwise convolution: weight (D, W), bias (D,) or None."""

    def __init__(
        self,
        d_model: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str = "auto",
    ):
        super().__init__()
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(torch.empty(d_model, width))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own start for a convolution with fan-in `width`."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}, activation={self.activation}"


class ShortConvolution(_Taps):
    """Depthwise causal convolution over time, (B, T, D) -> (B, T, D); the state is its last width - 1 inputs."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return causal_conv1d(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype), state,
            activation=self.activation, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def init_state(self, batch: int) -> Tensor:
        D, W = self.weight.shape
        return self.weight.new_zeros(batch, W - 1, D)


class DepthwiseConvolution(_Taps):
    """Depthwise convolution over both sides of every token, (B, T, D) -> (B, T, D); it needs the whole sequence."""

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return depthwise_conv1d(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype),
            activation=self.activation, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip


def initial_tails(convs: Iterable[nn.Module], batch: int) -> tuple[Tensor, ...]:
    """The states of several short convolutions before the first token."""
    return tuple(conv.init_state(batch) for conv in convs if isinstance(conv, ShortConvolution))
