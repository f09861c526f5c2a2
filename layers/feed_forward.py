"""The token-wise half of a block."""

from torch import Tensor, nn
from torch.nn import functional as F

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
        """x (..., D) -> (..., D), every vector by itself."""
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


class MLP(FeedForward):
    """W_2 gelu(W_1 x + b_1) + b_2, (..., D) -> (..., D): the feed-forward of the first transformers and of ViT.

    Args:
        d_model: D.
        hidden_size: rows of W_1; 4 D when omitted.
    """

    token_wise = True

    def __init__(self, d_model: int, *, hidden_size: int | None = None):
        super().__init__()
        hidden_size = 4 * d_model if hidden_size is None else hidden_size
        self.up_proj = nn.Linear(d_model, hidden_size)
        self.down_proj = nn.Linear(hidden_size, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), every vector by itself."""
        y: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return y
