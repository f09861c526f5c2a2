"""Hydra: a BERT without attention, positions or feed-forward, whose mixers are bidirectional state spaces."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Encoder, EncoderConfig, Hydra, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class HydraConfig(EncoderConfig):
    """Settings of Hydra; those of the mixer are explained at `zoo.layers.Hydra`."""

    d_state: Annotated[int, Range(1)] = 64
    expand: Annotated[int, Range(1)] = 2
    head_dim: Annotated[int, Range(1)] = 64
    n_groups: Annotated[int, Range(1)] = 1
    d_conv: Annotated[int, Range(1)] = 7


@register(
    "hydra",
    config=HydraConfig,
    sizes={
        "tiny": {"vocab_size": 258, "d_state": 32, "head_dim": 32},  # bytes, the end and the mask
        "ablation": {"d_model": 768, "n_layers": 12},
        "base": {"d_model": 768, "n_layers": 23},
    },
    task="masked_language_modelling",
    data="pydocs",
    decoder=None,  # it fills in hidden tokens and continues nothing
    produces="text",
    tags=("bidirectional", "encoder", "linear", "ssm"),
    paper="Hwang et al., Hydra, arXiv 2407.09941",
)
def hydra(config: HydraConfig) -> Encoder:
    """A quasiseparable matrix over time in every head: two scans and a diagonal."""
    mixer = partial(
        Hydra,
        d_state=config.d_state,
        expand=config.expand,
        head_dim=config.head_dim,
        n_groups=config.n_groups,
        d_conv=config.d_conv,
    )
    return Encoder(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "hydra", {"hydra": mixer}))
