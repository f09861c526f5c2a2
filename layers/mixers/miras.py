"""Miras' three mixers: one MLP that learns at test time, with three inner losses and three retention gates."""

from typing import Literal

from zoo.layers.memory_mixer import MemoryMixer
from zoo.layers.mixer_registry import register_mixer
from zoo.ops import HuberLoss, LpLoss, LqRetention, MemoryRule, MLPMemory, SoftmaxRetention

__all__ = ["Memora", "Moneta", "Yaad"]


@register_mixer("moneta")
class Moneta(MemoryMixer):
    """Moneta, (B, T, D) -> (B, T, D): the loss ||M(k) - v||_p^p, and weights A / ||A||_q^(q-2).

    Args:
        d_model, n_heads, conv_size, eta_max, keep, norm_eps, backend: see `zoo.layers.memory_mixer.MemoryMixer`.
        p, q: of the loss and of the gate; the paper's 3 and 4.
        expansion: inner units of the memory over its outputs.
        chunk_size: tokens whose gradients are taken at the same weights; part of the model.

    Source: arXiv 2504.13173, equations 24 and 25. Gates of one number a head are ours; the paper has one a channel.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        p: float = 3.0,
        q: float = 4.0,
        expansion: float = 4.0,
        chunk_size: int = 16,
        conv_size: int | None = 4,
        eta_max: float = 0.1,
        keep: float = 0.9999,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        rule = MemoryRule(
            memory=MLPMemory(expansion=expansion), loss=LpLoss(p), retention=LqRetention(q), chunk_size=chunk_size
        )
        super().__init__(
            d_model, rule=rule, n_heads=n_heads, conv_size=conv_size, eta_max=eta_max, keep=keep, norm_eps=norm_eps,
            backend=backend,
        )  # fmt: skip


@register_mixer("yaad")
class Yaad(MemoryMixer):
    """Yaad, (B, T, D) -> (B, T, D): a Huber loss whose threshold the token says, and weight decay.

    Args:
        d_model, n_heads, conv_size, eta_max, keep, norm_eps, backend: see `zoo.layers.memory_mixer.MemoryMixer`.
        huber: "norm", no gradient is longer than the threshold; "switch", the paper's jump between two losses;
            "coordinate", channel by channel.
        expansion, chunk_size: as in `Moneta`.

    Source: arXiv 2504.13173, equation 26. Gates of one number a head are ours; the paper has one a channel.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        huber: Literal["norm", "switch", "coordinate"] = "norm",
        expansion: float = 4.0,
        chunk_size: int = 16,
        conv_size: int | None = 4,
        eta_max: float = 0.3,
        keep: float = 0.999,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        rule = MemoryRule(memory=MLPMemory(expansion=expansion), loss=HuberLoss(huber), chunk_size=chunk_size)
        super().__init__(
            d_model, rule=rule, n_heads=n_heads, conv_size=conv_size, eta_max=eta_max, keep=keep, norm_eps=norm_eps,
            backend=backend,
        )  # fmt: skip


@register_mixer("memora")
class Memora(MemoryMixer):
    """Memora, (B, T, D) -> (B, T, D): squares, and weights c softmax(A), all above 0.

    A query reads the weights at the beginning of its chunk, so a token meets its own chunk through the convolutions
    alone: keep chunks short.

    Args:
        d_model, n_heads, conv_size, eta_max, keep, log_weights, norm_eps, backend: see
            `zoo.layers.memory_mixer.MemoryMixer`.
        expansion, chunk_size: as in `Moneta`.
        exact: a query reads the weights behind its own token, formed token by token: C times the memory.
        memory_eps: of the norm inside the memory. Positive weights have nearly equal outputs, whose differences a
            small number here magnifies without bound.

    Source: arXiv 2504.13173, equation 27; its linear form inside chunks can leave the simplex, and is not here. Gates
    of one number a head are ours.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expansion: float = 4.0,
        chunk_size: int = 16,
        exact: bool = False,
        conv_size: int | None = 4,
        eta_max: float = 0.3,
        keep: float = 0.999,
        log_weights: float = 1.0,
        memory_eps: float = 1e-2,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        rule = MemoryRule(
            memory=MLPMemory(expansion=expansion, norm_eps=memory_eps),
            retention=SoftmaxRetention(),
            chunk_size=chunk_size,
            reads="exact" if exact else "chunk",
        )
        super().__init__(
            d_model, rule=rule, n_heads=n_heads, conv_size=conv_size, eta_max=eta_max, keep=keep,
            log_weights=log_weights, norm_eps=norm_eps, backend=backend,
        )  # fmt: skip
