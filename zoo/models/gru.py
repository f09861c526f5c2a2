"""GRU with heads in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import GRU, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class GRUConfig(SequenceConfig):
    """Settings of the GRU; those of the mixer are explained at `zoo.layers.GRU`."""

    n_heads: Annotated[int, Range(1)] = 4
    head_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head


@register(
    "gru",
    config=GRUConfig,
    sizes={
        "tiny": {"hidden_size": 224, "vocab_size": 257},
        "160m": {"d_model": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 50304},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "nonlinear"),
    paper="Poeppel, Beck and Hochreiter, FlashRNN, arXiv 2412.07752",
)
def gru(config: GRUConfig) -> SequenceModel:
    """One memory, kept or replaced unit by unit."""
    mixers = {"gru": partial(GRU, n_heads=config.n_heads, norm_eps=config.head_norm_eps)}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "gru", mixers))
