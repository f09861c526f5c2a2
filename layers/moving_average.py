"""MEGA's moving average as a layer: N damped averages of each channel, a skip, and SiLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.mixer import Layer
from zoo.ops import damped_ema

__all__ = ["MovingAverage"]


class MovingAverage(Layer):
    """(B, T, D) -> (B, T, D): silu(y + omega * x), y_t = sum_n gamma_n h_t[n] / sqrt(N).

    h_t = (1 - p * sigmoid(alpha)) * h_{t-1} + p * beta * x_t with p = sigmoid(delta), for each channel and average.

    Args:
        d_model: D.
        d_state: N.
        backend: of zoo.ops.damped_ema.

    Source: arXiv 2209.10655, section 3.1; the start is that of the official code.
    """

    operators = (damped_ema,)

    def __init__(self, d_model: int, *, d_state: int = 16, backend: str = "auto"):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"MovingAverage: d_state must be at least 1; got {d_state}")
        self.backend = backend
        self.delta, self.alpha, self.beta, self.gamma = (
            nn.Parameter(torch.empty(d_model, d_state)) for _ in range(4)
        )  # fmt: skip
        self.omega = nn.Parameter(torch.empty(d_model))
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """delta, alpha N(0, 0.2), beta +1, -1, +1 ... + N(0, 0.02), gamma and omega N(0, 1)."""
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, ::2] += 1
            self.beta[:, 1::2] -= 1
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and c of `damped_ema`, (D, N) in float32 at least."""
        wide = torch.promote_types(self.delta.dtype, torch.float32)
        p = self.delta.to(wide).sigmoid()
        return (
            1 - p * self.alpha.to(wide).sigmoid(),
            p * self.beta.to(wide),
            self.gamma.to(wide) * self.gamma.shape[1] ** -0.5,
        )

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the averages before it (B, D, N) -> the output and the averages after it."""
        a, b, c = self.coefficients()
        y, state = damped_ema(
            x, a, b.to(x.dtype), c.to(x.dtype), state, cu_seqlens=cu_seqlens, backend=self.backend
        )  # fmt: skip
        return F.silu(torch.addcmul(y, self.omega.to(x.dtype), x)), state

    def init_state(self, batch: int) -> Tensor:
        """Averages of nothing: zeros (batch, D, N), float32 at least."""
        dtype = torch.promote_types(self.delta.dtype, torch.float32)
        return torch.zeros(batch, *self.delta.shape, dtype=dtype, device=self.delta.device)

    def extra_repr(self) -> str:
        """Channels and averages, for print(model)."""
        return f"{self.delta.shape[0]}, d_state={self.delta.shape[1]}"
