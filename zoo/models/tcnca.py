"""TCNCA: MEGA's gated attention in chunks behind dilated causal convolutions."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import TCNCA, layer_mixers
from zoo.layers.mega_model import MegaModel, MegaSettings
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class TCNCAConfig(MegaSettings):
    """Settings of TCNCA; those of the mixer are explained at `zoo.layers.TCNCA`."""

    conv_size: Annotated[int, Range(1)] = 17
    growth: Annotated[int, Range(1)] = 4
    n_levels: Annotated[int, Range(1, 32)] = 4
    per_level: Annotated[int, Range(1, 8)] = 1
    convolution: str = "depthwise"  # depthwise, separable or dense
    weight_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_levels > 1 and self.conv_size < self.growth:
            raise ValueError(
                f"conv_size must be at least growth = {self.growth}, or no path of taps reaches some lags; "
                f"got {self.conv_size}"
            )


@register(
    "tcnca",
    config=TCNCAConfig,
    sizes={
        "tiny": {"vocab_size": 257, "d_key": 32, "chunk_size": 64, "n_levels": 3},
        "enwik8": {  # mega_lm_enwik8_base with the network of 36,864 taps and biases a layer; its sizes are ours
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
    paper="Terzic et al., TCNCA: Temporal Convolution Network with Chunked Attention, arXiv 2312.05605",
)
def tcnca(config: TCNCAConfig) -> MegaModel:
    """Attention inside chunks; what crosses from chunk to chunk is a network of dilated convolutions."""
    mixer = partial(
        TCNCA,
        conv_size=config.conv_size,
        growth=config.growth,
        n_levels=config.n_levels,
        per_level=config.per_level,
        convolution=config.convolution,
        weight_norm=config.weight_norm,
        d_key=config.d_key,
        d_value=config.d_value,
        chunk_size=config.chunk_size,
        weights=config.weights,
        bias=config.bias,
        dropout=config.dropout,
        norm_eps=config.norm_eps,
    )
    return MegaModel(
        config, layer_mixers(config.d_model, config.n_layers, config.pattern or "tcnca", {"tcnca": mixer})
    )  # fmt: skip
