"""GAM: a short convolution and a read from a bank of learnt vectors, each behind a gate."""

import torch
from torch import Tensor, nn

from zoo.layers.conv import ShortConvolution, TailPrefixes
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import memory_bank

__all__ = ["GAM"]


@register_mixer("gam")
class GAM(Mixer):
    """sigmoid(a) * conv(x) + sigmoid(b) * bank(x) with [a, b] = W_g x + b_g, (B, T, D) -> (B, T, D).

    The bank is a parameter, and no sequence writes to it: it is a function of one token. So nothing but the convolution
    moves anything between positions, and an output sees the last `conv_size` tokens.

    Args:
        d_model: D.
        n_slots: M, vectors of the bank; D when omitted.
        conv_size: taps of the convolution, which has a bias and no activation.
        score_scale: of the bank's scores; the paper has none, which is 1.
        backend: of the convolution and zoo.ops.memory_bank.

    The state is the last conv_size - 1 inputs, (B, conv_size - 1, D).

    Raises:
        ValueError: n_slots or conv_size is below 1.

    Source: arXiv 2509.00605, section 3; its code, rishiraj/gam.
    """

    operators = (memory_bank,)

    def __init__(
        self,
        d_model: int,
        *,
        n_slots: int | None = None,
        conv_size: int = 3,
        score_scale: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        n_slots = d_model if n_slots is None else n_slots
        if min(n_slots, conv_size) < 1:
            raise ValueError(f"GAM: n_slots and conv_size must be at least 1; got {n_slots} and {conv_size}")
        self.score_scale, self.backend = score_scale, backend
        self.conv = ShortConvolution(d_model, conv_size, bias=True, activation=None, backend=backend)
        self.bank = nn.Parameter(torch.empty(n_slots, d_model))
        self.gate_proj = nn.Linear(d_model, 2 * d_model)  # [of the convolution, of the bank]
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start the bank as the paper's code does: uniform, with Xavier's bound sqrt(6 / (M + D))."""
        nn.init.xavier_uniform_(self.bank)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the inputs before it -> y (B, T, D) and the last inputs."""
        local, state = self.conv(x, state, cu_seqlens=cu_seqlens)
        return self._gated(x, local), state

    def look_ahead(self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, TailPrefixes]:
        """As `forward`; the inputs themselves know the state after every prefix (see zoo.layers.state.LooksAhead)."""
        local, prefixes = self.conv.look_ahead(x, state, cu_seqlens=cu_seqlens)
        return self._gated(x, local), prefixes

    def _gated(self, x: Tensor, local: Tensor) -> Tensor:
        """Both paths (B, T, D) behind their gates."""
        read = memory_bank(x, self.bank.to(x.dtype), scale=self.score_scale, backend=self.backend)
        a, b = self.gate_proj(x).sigmoid().chunk(2, dim=-1)
        y: Tensor = a * local + b * read
        return y

    def init_state(self, batch: int) -> Tensor:
        """The inputs before the first token: zeros (batch, conv_size - 1, D)."""
        return self.conv.init_state(batch)

    def extra_repr(self) -> str:
        """Slots and scale, for print(model)."""
        return f"n_slots={self.bank.shape[0]}, score_scale={self.score_scale}"
