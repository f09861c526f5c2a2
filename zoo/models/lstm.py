"""LSTM with heads in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import LSTM, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(SequenceConfig):
    """Settings of the LSTM; those of the mixer are explained at `zoo.layers.LSTM`."""

    n_heads: Annotated[int, Range(1)] = 4
    head_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head


@register(
    "lstm",
    config=LSTMConfig,
    sizes={
        "tiny": {"hidden_size": 176, "vocab_size": 257},
        "170m": {"d_model": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 50304},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "nonlinear"),
    paper="Poeppel, Beck and Hochreiter, FlashRNN, arXiv 2412.07752",
)
def lstm(config: LSTMConfig) -> SequenceModel:
    """Gates that mix the memory through a matrix for each head."""
    mixers = {"lstm": partial(LSTM, n_heads=config.n_heads, norm_eps=config.head_norm_eps)}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "lstm", mixers))
