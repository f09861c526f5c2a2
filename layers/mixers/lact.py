"""LaCT: a gated network that learns at test time from large chunks, by orthogonal updates."""

from zoo.layers.memory_mixer import MemoryMixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import DotProductLoss, GatedMLPMemory, GradientDescent, MemoryRule, Muon, RowNormRetention

__all__ = ["LaCT"]


@register_mixer("lact")
class LaCT(MemoryMixer):
    """Large-chunk test-time training, (B, T, D) -> (B, T, D): SwiGLU, the dot product, Muon, rows of fixed length.

    A query reads the weights at the beginning of its chunk, so inside a chunk nothing passes from token to token but
    through the convolutions. Put a window of attention beside it, at least as long as a chunk:
    "lact + attention(window=2048)".

    Args:
        d_model, n_heads, conv_size, eta_max, norm_eps, backend: see `zoo.layers.memory_mixer.MemoryMixer`. Steps weigh
            the tokens of a chunk against each other; with `muon_steps` their common size has no effect.
        expansion: inner units of the network over its outputs.
        chunk_size: tokens of one update; the paper's 2048 and more, so that all work is large products.
        muon_steps: Newton-Schulz iterations that bring an update's singular values near 1; 0 for plain descent.

    Raises:
        ValueError: a negative number of iterations.

    Source: arXiv 2505.23884, sections 2 and 3. One step size a token and head is ours; the paper has one a matrix.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 2,
        expansion: float = 1.0,
        chunk_size: int = 2048,
        muon_steps: int = 5,
        conv_size: int | None = None,
        eta_max: float = 1.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        if muon_steps < 0:
            raise ValueError(f"LaCT: muon_steps must be at least 0; got {muon_steps}")
        rule = MemoryRule(
            memory=GatedMLPMemory(expansion=expansion, residual=False, norm=False),
            loss=DotProductLoss(),
            retention=RowNormRetention(),
            algorithm=Muon(muon_steps) if muon_steps else GradientDescent(),
            chunk_size=chunk_size,
            reads="chunk",
        )
        super().__init__(
            d_model, rule=rule, n_heads=n_heads, conv_size=conv_size, eta_max=eta_max, keep=None, norm_eps=norm_eps,
            backend=backend,
        )  # fmt: skip
