"""Aaren in the transformer's first block: LayerNorm before, a feed-forward with GELU, biases everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import nn

from zoo.layers import MLP, Aaren, Block, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class AarenConfig(SequenceConfig):
    """Settings of Aaren; those of the mixer are explained at `zoo.layers.Aaren`.

    hidden_size: of the feed-forward with GELU; None for 4 d_model, 0 for none.
    """

    norm_eps: float = 1e-5
    n_heads: Annotated[int, Range(1)] = 4
    use_wq: bool = True
    bias: bool = True
    q_init_std: Annotated[float, Range(0)] = 0.02
    conv_size: Annotated[int | None, Range(1)] = None  # the paper's layer has no convolution


@register(
    "aaren",
    config=AarenConfig,
    sizes={
        "tiny": {"hidden_size": 384, "vocab_size": 257},
        "tiny-conv": {"hidden_size": 384, "vocab_size": 257, "conv_size": 4},
        "base": {"d_model": 512, "n_layers": 6, "n_heads": 8},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "linear", "recurrent"),
    paper="Feng et al., Attention as an RNN, arXiv 2405.13956",
)
def aaren(config: AarenConfig) -> SequenceModel:
    """Running averages of values, weighted by a learned constant query."""
    own = partial(
        Aaren,
        n_heads=config.n_heads,
        use_wq=config.use_wq,
        bias=config.bias,
        q_init_std=config.q_init_std,
        conv_size=config.conv_size,
    )
    mixer = layer_mixers(config.d_model, config.n_layers, config.pattern or "aaren", {"aaren": own})
    norm = partial(nn.LayerNorm, eps=config.norm_eps)

    def blocks() -> Iterator[Block]:
        for i in range(config.n_layers):
            feed_forward = None if config.hidden_size == 0 else MLP(config.d_model, hidden_size=config.hidden_size)
            yield Block(
                config.d_model, mixer(i), feed_forward,
                norm=norm, residual_scale=config.residual_scale, dropout=config.dropout,
            )  # fmt: skip

    return SequenceModel(config, blocks(), norm=norm(config.d_model))
