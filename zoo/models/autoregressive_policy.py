"""A policy that predicts the tokens of a chunk of actions one after the other, through any causal mixers."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Attention, layer_mixers
from zoo.layers.policy import AutoregressivePolicy, PolicyConfig
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class AutoregressivePolicyConfig(PolicyConfig):
    """Fields of PolicyConfig, heads, and mixers by layer."""

    n_heads: Annotated[int, Range(1)] = 8
    pattern: str = ""  # causal mixers by layer; empty for attention everywhere


@register(
    "autoregressive_policy",
    config=AutoregressivePolicyConfig,
    sizes={"tiny": {"d_model": 128, "n_layers": 3, "n_heads": 4, "dropout": 0.0}, "base": {}},
    task="imitation",
    data="reaching",
    decoder=None,
    produces="actions",
    tags=("attention", "robots", "policy"),
    paper="the decoder of Brohan et al., RT-2, arXiv 2307.15818, without its encoders of pictures and text",
)
def autoregressive_policy(config: AutoregressivePolicyConfig) -> AutoregressivePolicy:
    """Causal attention to the observations and to the tokens before."""
    own = {"attention": partial(Attention, n_heads=config.n_heads)}
    return AutoregressivePolicy(
        config, layer_mixers(config.d_model, config.n_layers, config.pattern or "attention", own)
    )
