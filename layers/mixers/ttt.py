"""TTT: a layer whose state is a linear model or a two-layer network, trained by plain gradient descent."""

from typing import Literal

from zoo.layers.memory_mixer import MemoryMixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import MatrixMemory, MemoryRule, MLPMemory

__all__ = ["TTT"]


@register_mixer("ttt")
class TTT(MemoryMixer):
    """Test-time training, (B, T, D) -> (B, T, D): x + LN(W x + b) or x + LN(MLP(x)), squares, no decay, no momentum.

    Args:
        d_model, n_heads, conv_size, norm_eps, backend: see `zoo.layers.memory_mixer.MemoryMixer`.
        learner: "linear" for TTT-Linear, "mlp" for TTT-MLP, whose inner layer is four times as wide.
        chunk_size: tokens whose gradients are taken at the same weights; the paper's 16.
        eta_max: steps are in (0, eta_max / (D / H)); the paper's 1 for "linear" and 0.1 for "mlp" when omitted.

    Raises:
        ValueError: an unknown learner.

    Source: arXiv 2407.04620, sections 2.2 to 2.7. Keys and queries have length 1 here and no rotation. Steps are not
    divided by the token's place in its chunk, as the public code has them and the paper does not.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        learner: Literal["linear", "mlp"] = "linear",
        chunk_size: int = 16,
        conv_size: int | None = 4,
        eta_max: float | None = None,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        if learner not in ("linear", "mlp"):
            raise ValueError(f"TTT: learner must be linear or mlp; got {learner!r}")
        linear = learner == "linear"
        memory = MatrixMemory(bias=True) if linear else MLPMemory(bias=True)
        super().__init__(
            d_model, rule=MemoryRule(memory=memory, chunk_size=chunk_size), n_heads=n_heads, conv_size=conv_size,
            eta_max=(1.0 if linear else 0.1) if eta_max is None else eta_max, keep=None, norm_eps=norm_eps,
            backend=backend,
        )  # fmt: skip
