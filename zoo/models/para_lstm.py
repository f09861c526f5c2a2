"""ParaLSTM: an LSTM whose channels do not see each other's states, trained in parallel over time."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import ParaLSTM, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class ParaLSTMConfig(SequenceConfig):
    """Settings of ParaLSTM; those of the mixer are explained at `zoo.layers.ParaLSTM`."""

    vocab_size: int = 50432  # GPT-NeoX's, padded
    residual_scale: bool = True
    n_heads: Annotated[int, Range(1)] = 4
    d_conv: Annotated[int, Range(1)] = 4
    recurrent_clip: Annotated[float | None, Range(above=0)] = 0.5  # None: no bound, for tasks that count
    iterations: Annotated[int | None, Range(1)] = None  # Newton steps, unchecked; None: as many as it takes


@register(
    "para_lstm",
    config=ParaLSTMConfig,
    sizes={
        "tiny": {"hidden_size": 264, "vocab_size": 257},
        "400m": {"d_model": 1024, "n_layers": 24},
        "1b": {"d_model": 2048, "n_layers": 24},
        "2.9b": {"d_model": 2560, "n_layers": 32, "n_heads": 2},
        "7b": {"d_model": 4096, "n_layers": 32},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "nonlinear", "recurrent"),
    paper="Danieli et al., ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for LLMs, arXiv 2510.21450",
)
def para_lstm(config: ParaLSTMConfig) -> SequenceModel:
    """A nonlinear recurrence, solved by Newton's method."""
    mixer = partial(
        ParaLSTM, n_heads=config.n_heads, d_conv=config.d_conv, recurrent_clip=config.recurrent_clip,
        iterations=config.iterations,
    )  # fmt: skip
    pattern = config.pattern or "para_lstm"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, {"para_lstm": mixer}))
