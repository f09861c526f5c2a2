"""Mamba-2: state spaces with one decay per head, computed by matrix products."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Mamba2, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(SequenceConfig):
    """Settings of Mamba-2; those of the mixer are explained at `zoo.layers.Mamba2`."""

    hidden_size: int | None = 0
    vocab_size: int = 50288  # GPT-NeoX's 50277, up to a multiple of 16
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    d_state: Annotated[int, Range(1)] = 128
    expand: Annotated[int, Range(1)] = 2
    head_dim: Annotated[int, Range(1)] = 64
    n_groups: Annotated[int, Range(1)] = 1
    d_conv: Annotated[int, Range(1)] = 4


@register(
    "mamba2",
    config=Mamba2Config,
    sizes={
        "tiny": {"n_layers": 8, "vocab_size": 257, "d_state": 64, "head_dim": 32},
        "130m": {"d_model": 768, "n_layers": 24},
        "370m": {"d_model": 1024, "n_layers": 48},
        "780m": {"d_model": 1536, "n_layers": 48},
        "1.3b": {"d_model": 2048, "n_layers": 48},
        "2.7b": {"d_model": 2560, "n_layers": 64},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent", "ssm"),
    paper="Dao and Gu, Transformers are SSMs, arXiv 2405.21060",
)
def mamba2(config: Mamba2Config) -> SequenceModel:
    """A matrix memory that forgets at one rate per head."""
    mixer = partial(
        Mamba2,
        d_state=config.d_state,
        expand=config.expand,
        head_dim=config.head_dim,
        n_groups=config.n_groups,
        d_conv=config.d_conv,
        norm_eps=config.norm_eps,
    )
    pattern = config.pattern or "mamba2"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, {"mamba2": mixer}))
