"""Gated DeltaNet: the delta rule with a forgetting gate, in LLaMA's block, and its hybrid with sliding attention."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import GatedDeltaNet, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(SequenceConfig):
    """Settings of Gated DeltaNet; those of the mixer are explained at `zoo.layers.GatedDeltaNet`."""

    n_heads: Annotated[int, Range(1)] = 6
    n_v_heads: Annotated[int | None, Range(1)] = None  # None: as many as n_heads
    head_dim: Annotated[int, Range(1)] = 256
    expand_v: Annotated[float, Range(above=0)] = 2.0
    conv_size: Annotated[int | None, Range(1)] = 4
    allow_neg_eigval: bool = False
    use_gate: bool = True
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


@register(
    "gated_deltanet",
    config=GatedDeltaNetConfig,
    sizes={
        "tiny": {"hidden_size": 256, "vocab_size": 257, "n_heads": 2, "head_dim": 48, "expand_v": 1.0},
        "340m": {"d_model": 1024, "n_layers": 21, "n_heads": 3},  # n_heads * head_dim = 0.75 d_model
        "500m": {"d_model": 1024, "n_layers": 21},  # released as a 340M configuration; it has 512 million parameters
        "1.3b": {"d_model": 2048, "n_layers": 21},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent"),
    paper="Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464",
)
def gated_deltanet(config: GatedDeltaNetConfig) -> SequenceModel:
    """A memory that writes corrections and forgets."""
    mixer = partial(
        GatedDeltaNet,
        n_heads=config.n_heads,
        n_v_heads=config.n_v_heads,
        head_dim=config.head_dim,
        expand_v=config.expand_v,
        conv_size=config.conv_size,
        allow_neg_eigval=config.allow_neg_eigval,
        use_gate=config.use_gate,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"gated_deltanet": mixer}
    pattern = config.pattern or "gated_deltanet"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, mixers))
