"""DeltaNet: the delta rule in LLaMA's block, and its hybrids with attention."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import DeltaNet, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(SequenceConfig):
    """Settings of DeltaNet; those of the mixer are explained at `zoo.layers.DeltaNet`."""

    n_heads: Annotated[int, Range(1)] = 2
    expand_k: Annotated[float, Range(above=0)] = 1.0
    expand_v: Annotated[float, Range(above=0)] = 1.0
    conv_size: Annotated[int | None, Range(1)] = 4
    qk_activation: str = "silu"
    qk_norm: str = "l2"
    use_beta: bool = True
    allow_neg_eigval: bool = False
    use_gate: bool = False
    use_output_norm: bool = True
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


_340M = {"d_model": 1024, "n_layers": 24, "n_heads": 8}
_1_3B = {"d_model": 2048, "n_layers": 24, "n_heads": 16}
_SLIDING = {"pattern": "deltanet, attention(window=2048)"}  # every other layer
_GLOBAL = {"pattern": "deltanet, attention, deltanet*10, attention, deltanet*11"}  # layers 2 and N/2 + 1


@register(
    "deltanet",
    config=DeltaNetConfig,
    sizes={
        "tiny": {"hidden_size": 256, "vocab_size": 257},
        "340m": _340M,
        "340m_sliding": _340M | _SLIDING,
        "340m_global": _340M | _GLOBAL,
        "1.3b": _1_3B,
        "1.3b_sliding": _1_3B | _SLIDING,
        "1.3b_global": _1_3B | _GLOBAL,
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent"),
    paper="Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484",
)
def deltanet(config: DeltaNetConfig) -> SequenceModel:
    """A memory that writes corrections."""
    mixer = partial(
        DeltaNet,
        n_heads=config.n_heads,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        conv_size=config.conv_size,
        qk_activation=config.qk_activation,
        qk_norm=config.qk_norm,
        use_beta=config.use_beta,
        allow_neg_eigval=config.allow_neg_eigval,
        use_gate=config.use_gate,
        use_output_norm=config.use_output_norm,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"deltanet": mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "deltanet", mixers))
