"""LaCT: large chunks for test-time training, beside a window of attention."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import LaCT, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class LaCTConfig(SequenceConfig):
    """Settings of LaCT; those of the mixer are explained at `zoo.layers.LaCT`."""

    n_heads: Annotated[int, Range(1)] = 4  # of the memory; few and wide
    expansion: Annotated[float, Range(above=0, most=64)] = 1.0
    chunk_size: Annotated[int, Range(1, 1_048_576)] = 2048
    muon_steps: Annotated[int, Range(0, 20)] = 5
    conv_size: Annotated[int | None, Range(1)] = None
    eta_max: Annotated[float, Range(above=0)] = 1.0
    window: Annotated[int, Range(1)] = 2048  # of the attention in the default pattern; at least chunk_size
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


@register(
    "lact",
    config=LaCTConfig,
    sizes={
        "tiny": {"n_heads": 2, "hidden_size": 256, "vocab_size": 257, "chunk_size": 64, "window": 64},
        "340m": {"d_model": 1024, "n_layers": 24},
        "760m": {"d_model": 1536, "n_layers": 24},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "attention", "hybrid", "test-time"),
    paper="Zhang et al., Test-Time Training Done Right, arXiv 2505.23884",
)
def lact(config: LaCTConfig) -> SequenceModel:
    """Fast weights that are updated once a large chunk, beside attention that sees inside it."""
    mixer = partial(
        LaCT,
        n_heads=config.n_heads,
        expansion=config.expansion,
        chunk_size=config.chunk_size,
        muon_steps=config.muon_steps,
        conv_size=config.conv_size,
        eta_max=config.eta_max,
        norm_eps=config.output_norm_eps,
    )
    pattern = config.pattern or f"lact + attention(window={config.window})"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, {"lact": mixer}))
