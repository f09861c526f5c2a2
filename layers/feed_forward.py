"""The token-wise half of a block."""

from torch import Tensor, nn

from zoo.layers.mixer import FeedForward
from zoo.ops import swiglu


def swiglu_size(d_model: int) -> int:
    """LLaMA's hidden width: 8/3 of d_model, rounded up to a multiple of 256 (1024 -> 2816, 2048 -> 5632)."""
    return 256 * -(-int(8 * d_model / 3) // 256)


class SwiGLU(FeedForward):
    """W_down(silu(W_gate x) * W_up x), without biases; (..., D) -> (..., D)."""

    operators = (swiglu,)
    token_wise = True

    def __init__(self, d_model: int, *, hidden_size: int | None = None):
        super().__init__()
        hidden_size = hidden_size or swiglu_size(d_model)
        self.gate_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y
