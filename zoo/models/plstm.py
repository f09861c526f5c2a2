"""pLSTM for language: a linear recurrence whose transitions may turn the state's sign."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import PLSTM, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class PLSTMConfig(SequenceConfig):
    """Settings of pLSTM; those of the mixer are explained at `zoo.layers.PLSTM`."""

    hidden_size: int | None = 0
    n_heads: Annotated[int, Range(1)] = 4
    expand: Annotated[int, Range(1)] = 2
    conv_size: Annotated[int, Range(1)] = 4
    gate_std: Annotated[float, Range(0)] = 0.02
    output_norm_eps: Annotated[float, Range(0)] = 1e-5


@register(
    "plstm",
    config=PLSTMConfig,
    sizes={"tiny": {"vocab_size": 257, "n_heads": 8}},
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent"),
    paper="Poeppel et al., pLSTM: parallelizable Linear Source Transition Mark networks, arXiv 2506.11997",
)
def plstm(config: PLSTMConfig) -> SequenceModel:
    """Source, transition and mark gates on a line; a transition may be negative."""
    mixer = partial(
        PLSTM,
        n_heads=config.n_heads,
        expand=config.expand,
        conv_size=config.conv_size,
        gate_std=config.gate_std,
        norm_eps=config.output_norm_eps,
    )
    pattern = config.pattern or "plstm"
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, pattern, {"plstm": mixer}))
