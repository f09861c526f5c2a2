"""Memora: squares and softmax retention, in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Memora, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class MemoraConfig(SequenceConfig):
    """Settings of Memora; those of the mixer are explained at `zoo.layers.Memora`."""

    n_heads: Annotated[int, Range(1)] = 4
    exact: bool = False
    log_weights: Annotated[float, Range(0)] = 1.0
    memory_eps: Annotated[float, Range(above=0)] = 1e-2
    expansion: Annotated[float, Range(above=0, most=64)] = 4.0
    chunk_size: Annotated[int, Range(1, 65_536)] = 16
    conv_size: Annotated[int | None, Range(1)] = 4
    eta_max: Annotated[float, Range(above=0)] = 0.3
    keep: Annotated[float, Range(above=0, below=1)] = 0.999
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


_340M = {"d_model": 1024, "n_layers": 24, "n_heads": 16}
_HYBRID = {"pattern": "memora, attention(window=2048)"}  # the paper alternates; its window is not given


@register(
    "memora",
    config=MemoraConfig,
    sizes={
        "tiny": {"n_heads": 4, "hidden_size": 256, "vocab_size": 257},
        "170m": {"d_model": 768, "n_layers": 12, "n_heads": 16},
        "340m": _340M,
        "340m_hybrid": _340M | _HYBRID,
        "780m": {"d_model": 1536, "n_layers": 24, "n_heads": 16},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "test-time"),
    paper="Behrouz et al., It's All Connected (Miras), arXiv 2504.13173",
)
def memora(config: MemoraConfig) -> SequenceModel:
    """A deep memory whose weights are softmaxes."""
    mixer = partial(
        Memora,
        n_heads=config.n_heads,
        exact=config.exact,
        log_weights=config.log_weights,
        memory_eps=config.memory_eps,
        expansion=config.expansion,
        chunk_size=config.chunk_size,
        conv_size=config.conv_size,
        eta_max=config.eta_max,
        keep=config.keep,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"memora": mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "memora", mixers))
