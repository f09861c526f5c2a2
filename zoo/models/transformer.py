"""Transformer++: LLaMA's block with full softmax attention, the baseline."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Attention, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(SequenceConfig):
    """Settings of the Transformer; those of the mixer are explained at `zoo.layers.Attention`."""

    n_heads: Annotated[int, Range(1)] = 2
    n_kv_heads: Annotated[int | None, Range(1)] = None  # None: as many as n_heads
    head_dim: Annotated[int | None, Range(1)] = None  # None: d_model / n_heads
    window: Annotated[int | None, Range(1)] = None  # None: every layer sees the whole past
    rope_base: Annotated[float, Range(above=0)] = 10000.0
    qk_norm: bool = False
    qk_norm_eps: Annotated[float, Range(0)] = 1e-6


@register(
    "transformer",
    config=TransformerConfig,
    sizes={
        "tiny": {"hidden_size": 256, "vocab_size": 257},
        "340m": {"d_model": 1024, "n_layers": 24, "n_heads": 16},
        "1.3b": {"d_model": 2048, "n_layers": 24, "n_heads": 32},
        "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_size": 14336},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("attention", "causal"),
    paper="Touvron et al., LLaMA, arXiv 2302.13971; sizes of Yang et al., arXiv 2312.06635",
)
def transformer(config: TransformerConfig) -> SequenceModel:
    """Rotary attention and SwiGLU under RMSNorm."""
    attention = partial(
        Attention,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        window=config.window,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        norm_eps=config.qk_norm_eps,
    )
    mixers = {"attention": attention}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "attention", mixers))
