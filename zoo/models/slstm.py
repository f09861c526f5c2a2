"""sLSTM in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import nn

from zoo.layers import SLSTM, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class SLSTMConfig(SequenceConfig):
    """Settings of the sLSTM; those of the mixer are explained at `zoo.layers.SLSTM`."""

    n_heads: Annotated[int, Range(1)] = 4
    conv_size: Annotated[int | None, Range(1)] = 4
    head_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head


@register(
    "slstm",
    config=SLSTMConfig,
    sizes={
        "tiny": {"hidden_size": 344, "vocab_size": 257},
        "140m": {"d_model": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 50304},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "nonlinear"),
    paper="Beck et al., xLSTM: Extended Long Short-Term Memory, arXiv 2405.04517",
)
def slstm(config: SLSTMConfig) -> SequenceModel:
    """Exponential gates under a stabiliser, which mix the memory through a matrix for each head."""
    own = partial(SLSTM, n_heads=config.n_heads, conv_size=config.conv_size, norm_eps=config.head_norm_eps)
    make = layer_mixers(config.d_model, config.n_layers, config.pattern or "slstm", {"slstm": own})

    def mixer(i: int) -> nn.Module:
        made = make(i)
        if isinstance(made, SLSTM):  # its forget biases depend on where it stands
            made.depth = i / max(1, config.n_layers - 1)
        return made

    return SequenceModel(config, mixer)
