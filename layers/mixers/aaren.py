"""Aaren: attention whose query is one learned token, so that it is a recurrence with a small state."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.conv import ShortConvolution, initial_tails, side_by_side
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import aaren
from zoo.ops.core.algebra import LogSumExp

__all__ = ["Aaren"]


class AarenState(NamedTuple):
    """sums: m, u (B, H) and w (B, H, K) in float32, see zoo.ops.aaren; tails: of the short convolution."""

    sums: LogSumExp
    tails: tuple[Tensor, ...]


@register_mixer("aaren")
class Aaren(Mixer):
    """Softmax attention with a constant query, (B, T, D) -> (B, T, D): a running average of values in every head.

    The weight of a token is the same for every later position. So the layer sums up what it saw; it cannot look up.

    Args:
        d_model: D.
        n_heads: H, divides D; K = D / H.
        use_wq: the query is W_q z + b_q of a learned token z, as in the paper; else it is z itself.
        scale: of the scores; K**-0.5 when omitted.
        bias: of all linear layers.
        q_init_std: how far the query token starts from 0; small numbers begin with plain averages.
        conv_size: taps of a short convolution before keys and values, which the paper does not have. Without one, and
            without positions in x, the order of tokens is lost.
        backend: of zoo.ops.aaren and the convolution.

    Raises:
        ValueError: n_heads does not divide d_model.

    Source: arXiv 2405.13956, section 3. The paper does not say how the query token starts.
    """

    operators = (aaren,)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        use_wq: bool = True,
        scale: float | None = None,
        bias: bool = True,
        q_init_std: float = 0.02,
        conv_size: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"Aaren: n_heads must divide d_model = {d_model}; got {n_heads}")
        self.n_heads, self.q_init_std, self.backend = n_heads, q_init_std, backend
        self.scale = (d_model // n_heads) ** -0.5 if scale is None else scale
        self.query = nn.Parameter(torch.empty(d_model))
        self.q_proj = nn.Linear(d_model, d_model, bias=bias) if use_wq else None
        self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=bias) for _ in range(3))
        taps = [] if conv_size is None else [ShortConvolution(d_model, conv_size, backend=backend)]
        self.convs = nn.ModuleList(taps)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start the query token; the linear layers start with the model's."""
        nn.init.normal_(self.query, std=self.q_init_std)

    def forward(
        self, x: Tensor, state: AarenState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AarenState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        sums, tails = (None, ()) if state is None else state
        (x,), tails = side_by_side(self.convs, [x], tails, cu_seqlens=cu_seqlens)
        query = self.query.to(x.dtype)
        q = (query if self.q_proj is None else self.q_proj(query)).unflatten(0, (self.n_heads, -1))  # (H, K)
        k, v = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.k_proj, self.v_proj))  # (B, T, H, K)
        s = torch.einsum("hk,bthk->bth", q * self.scale, k)
        o, sums = aaren(s, v, sums, cu_seqlens=cu_seqlens, backend=self.backend)
        return self.o_proj(o.flatten(2)), AarenState(sums, tails)

    def init_state(self, batch: int) -> AarenState:
        """The state of what saw nothing: sums at m = -inf, and zeros for the convolution."""
        size = self.query.shape[0] // self.n_heads
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        w = torch.zeros(batch, self.n_heads, size, dtype=dtype, device=self.query.device)
        return AarenState(LogSumExp.identity(w), initial_tails(self.convs, batch))

    def extra_repr(self) -> str:
        """The number of heads, for print(model)."""
        return f"n_heads={self.n_heads}"
