"""GLA: gated linear attention in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import GatedLinearAttention, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class GLAConfig(SequenceConfig):
    """Settings of GLA; those of the mixer are explained at `zoo.layers.GatedLinearAttention`."""

    n_heads: Annotated[int, Range(1)] = 4
    n_kv_heads: Annotated[int | None, Range(1)] = None  # None: as many as n_heads
    expand_k: Annotated[float, Range(above=0)] = 0.5
    expand_v: Annotated[float, Range(above=0)] = 1.0
    gate_rank: Annotated[int, Range(1)] = 16
    temperature: Annotated[float, Range(above=0)] = 16.0  # the paper's tau
    gate_floor: Annotated[float | None, Range(most=0)] = None
    conv_size: Annotated[int | None, Range(1)] = None  # the paper's models have no short convolution
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


@register(
    "gla",
    config=GLAConfig,
    sizes={
        "tiny": {"n_heads": 2, "hidden_size": 256, "vocab_size": 257},
        "340m": {"d_model": 1024, "n_layers": 24},
        "1.3b": {"d_model": 2048, "n_layers": 24},
        "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 16, "hidden_size": 11008},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent"),
    paper="Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635",
)
def gla(config: GLAConfig) -> SequenceModel:
    """A memory whose rows decay at data-dependent rates."""
    mixer = partial(
        GatedLinearAttention,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        gate_rank=config.gate_rank,
        temperature=config.temperature,
        gate_floor=config.gate_floor,
        conv_size=config.conv_size,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"gla": mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "gla", mixers))
