"""MEGA: gated attention in chunks behind damped moving averages."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Mega, layer_mixers
from zoo.layers.mega_model import MegaModel, MegaSettings
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class MegaConfig(MegaSettings):
    """Settings of MEGA; those of the mixer are explained at `zoo.layers.Mega`."""

    d_state: Annotated[int, Range(1)] = 16


@register(
    "mega",
    config=MegaConfig,
    sizes={
        "tiny": {"vocab_size": 257, "d_key": 32, "chunk_size": 64},
        "enwik8": {  # mega_lm_enwik8_base; 208 is its dictionary of bytes, up to a multiple of 8
            "d_model": 512,
            "n_layers": 12,
            "vocab_size": 208,
            "chunk_size": 2048,
            "dropout": 0.1,
        },
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent"),
    paper="Ma et al., Mega: Moving Average Equipped Gated Attention, arXiv 2209.10655",
)
def mega(config: MegaConfig) -> MegaModel:
    """Attention inside chunks; what crosses from chunk to chunk is a moving average."""
    mixer = partial(
        Mega,
        d_state=config.d_state,
        d_key=config.d_key,
        d_value=config.d_value,
        chunk_size=config.chunk_size,
        weights=config.weights,
        bias=config.bias,
        dropout=config.dropout,
        norm_eps=config.norm_eps,
    )
    return MegaModel(
        config, layer_mixers(config.d_model, config.n_layers, config.pattern or "mega", {"mega": mixer})
    )  # fmt: skip
