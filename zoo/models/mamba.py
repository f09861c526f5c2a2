"""Mamba: selective state spaces without any feed-forward, and its time-invariant twin."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Mamba, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class MambaConfig(SequenceConfig):
    """Settings of Mamba; those of the mixer are explained at `zoo.layers.Mamba`."""

    hidden_size: int | None = 0
    vocab_size: int = 50280  # GPT-NeoX's 50277, up to a multiple of 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    d_state: Annotated[int, Range(1)] = 16
    expand: Annotated[int, Range(1)] = 2
    d_conv: Annotated[int, Range(1)] = 4
    dt_rank: Annotated[int | None, Range(1)] = None  # None: a sixteenth of d_model, rounded up
    selective: bool = True  # False: the same block around constant parameters


@register(
    "mamba",
    config=MambaConfig,
    sizes={
        "tiny": {"n_layers": 8, "vocab_size": 257},
        "130m": {"d_model": 768, "n_layers": 24},
        "370m": {"d_model": 1024, "n_layers": 48},
        "790m": {"d_model": 1536, "n_layers": 48},
        "1.4b": {"d_model": 2048, "n_layers": 48},
        "2.8b": {"d_model": 2560, "n_layers": 64},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "ssm"),
    paper="Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752",
)
def mamba(config: MambaConfig) -> SequenceModel:
    """A diagonal state space whose step size and maps are chosen by the token."""
    mixer = partial(
        Mamba,
        d_state=config.d_state,
        expand=config.expand,
        d_conv=config.d_conv,
        dt_rank=config.dt_rank,
        selective=config.selective,
    )
    pattern = config.pattern or "mamba"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, {"mamba": mixer}))
