"""Titans' long-term memory in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import SequenceConfig, SequenceModel, Titans, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class TitansConfig(SequenceConfig):
    """Settings of Titans; those of the mixer are explained at `zoo.layers.Titans`."""

    n_heads: Annotated[int, Range(1)] = 4
    expansion: Annotated[float | None, Range(above=0, most=64)] = 4.0
    chunk_size: Annotated[int, Range(1, 65_536)] = 16
    conv_size: Annotated[int | None, Range(1)] = 4
    eta_max: Annotated[float, Range(above=0)] = 0.3
    keep: Annotated[float, Range(above=0, below=1)] = 0.999
    keep_momentum: Annotated[float, Range(above=0, below=1)] = 0.9
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


_340M = {"d_model": 1024, "n_layers": 24, "n_heads": 16}


@register(
    "titans",
    config=TitansConfig,
    sizes={
        "tiny": {"n_heads": 4, "hidden_size": 256, "vocab_size": 257},
        "170m": {"d_model": 768, "n_layers": 12, "n_heads": 16},
        "340m": _340M,
        "340m_mal": _340M | {"pattern": "titans, attention(window=2048)"},  # the paper's window is not given
        "340m_mag": _340M | {"pattern": "titans + attention(window=2048)"},
        "760m": {"d_model": 1536, "n_layers": 24, "n_heads": 16},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "test-time"),
    paper="Behrouz et al., Titans, arXiv 2501.00663",
)
def titans(config: TitansConfig) -> SequenceModel:
    """A deep memory that learns what surprises it, with momentum."""
    mixer = partial(
        Titans,
        n_heads=config.n_heads,
        expansion=config.expansion,
        chunk_size=config.chunk_size,
        conv_size=config.conv_size,
        eta_max=config.eta_max,
        keep=config.keep,
        keep_momentum=config.keep_momentum,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"titans": mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "titans", mixers))
