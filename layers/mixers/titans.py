"""Titans' long-term memory: an MLP that learns at test time by gradient descent with momentum."""

from zoo.layers.memory_mixer import MemoryMixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import MatrixMemory, MemoryRule, MLPMemory, Momentum

__all__ = ["Titans"]


@register_mixer("titans")
class Titans(MemoryMixer):
    """Titans' long-term memory, (B, T, D) -> (B, T, D): squares, momentum and weight decay, all gated by the token.

    Args:
        d_model, n_heads, conv_size, eta_max, keep, keep_momentum, norm_eps, backend: see
            `zoo.layers.memory_mixer.MemoryMixer`.
        expansion: inner units of the memory over its outputs; None for a matrix in place of the two-layer network.
        chunk_size: tokens whose gradients are taken at the same weights; part of the model.

    Source: arXiv 2501.00663, sections 3.1 and 3.2 (the model named LMM). Its other three wirings are patterns here:
    "titans, attention(window=W)" is MAL, and "titans + attention(window=W)" is MAG with a sum for its product.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expansion: float | None = 4.0,
        chunk_size: int = 16,
        conv_size: int | None = 4,
        eta_max: float = 0.3,
        keep: float = 0.999,
        keep_momentum: float = 0.9,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        memory = MatrixMemory() if expansion is None else MLPMemory(expansion=expansion)
        rule = MemoryRule(memory=memory, algorithm=Momentum(), chunk_size=chunk_size)
        super().__init__(
            d_model, rule=rule, n_heads=n_heads, conv_size=conv_size, eta_max=eta_max, keep=keep,
            keep_momentum=keep_momentum, norm_eps=norm_eps, backend=backend,
        )  # fmt: skip
