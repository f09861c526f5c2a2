"""GAM: short convolutions and reads from learnt memory banks; and the same between layers of attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from torch import nn

from zoo.layers import GAM, Block, SequenceConfig, SequenceModel, layer_mixers
from zoo.layers.gam_block import GAMBlock, start_as_torch_does
from zoo.layers.positions import LearnedPositions, position_block
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class GAMConfig(SequenceConfig):
    """Settings of GAM; those of the mixer are explained at `zoo.layers.GAM`.

    hidden_size: of the feed-forward with GELU; None for 4 d_model, 0 for none.
    max_length: tokens of the longest sequence, each of which has a learnt vector of its place; None for no positions.
    dropout: on the embedded tokens and behind every feed-forward.
    init: "official" starts as the paper's code does, "zoo" from N(0, init_std) everywhere but in the banks.
    """

    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    n_slots: Annotated[int | None, Range(1)] = None  # None: as many as d_model
    conv_size: Annotated[int, Range(1)] = 3
    score_scale: Annotated[float, Range(0)] = 1.0  # the paper has no 1 / sqrt(d_model)
    max_length: Annotated[int | None, Range(1)] = 256
    init: Literal["official", "zoo"] = "official"


@dataclass(frozen=True, kw_only=True)
class GAMHybridConfig(GAMConfig):
    """Settings of GAM between layers that look back.

    pattern: empty for rotary attention with n_heads heads in every second layer.
    """

    max_length: int | None = None  # attention finds its own places
    init: Literal["official", "zoo"] = "zoo"
    n_heads: Annotated[int, Range(1)] = 4


def _model(config: GAMConfig, pattern: str) -> SequenceModel:
    """The stack that both models are."""
    own = {
        "gam": partial(
            GAM, n_slots=config.n_slots, conv_size=config.conv_size, score_scale=config.score_scale
        )
    }  # fmt: skip
    mixer = layer_mixers(config.d_model, config.n_layers, pattern, own)
    positions = None if config.max_length is None else LearnedPositions(config.d_model, config.max_length)

    def blocks() -> Iterator[Block]:
        if positions is not None:
            yield position_block(config.d_model, positions, config.dropout)
        for i in range(config.n_layers):
            yield GAMBlock(
                config.d_model, mixer(i), hidden_size=config.hidden_size, norm_eps=config.norm_eps,
                dropout=config.dropout, residual_scale=config.residual_scale,
            )  # fmt: skip

    model = SequenceModel(config, blocks(), norm=nn.LayerNorm(config.d_model, eps=config.norm_eps))
    if config.init == "official":
        start_as_torch_does(model, None if positions is None else positions.table)
    return model


@register(
    "gam",
    config=GAMConfig,
    sizes={
        "tiny": {"hidden_size": 384, "vocab_size": 257, "max_length": 1024},
        "22.6m": {"d_model": 512, "n_layers": 6, "vocab_size": 10_000, "dropout": 0.1},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "convolution"),
    paper="Acharya, Gated Associative Memory, arXiv 2509.00605",
)
def gam(config: GAMConfig) -> SequenceModel:
    """A stack of short convolutions and softmax feed-forwards; it sees the last few tokens."""
    return _model(config, config.pattern or "gam")


@register(
    "gam_hybrid",
    config=GAMHybridConfig,
    sizes={"tiny": {"hidden_size": 384, "vocab_size": 257}},
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("attention", "causal", "convolution"),
    paper="zoo's own; the block of Acharya, Gated Associative Memory, arXiv 2509.00605",
)
def gam_hybrid(config: GAMHybridConfig) -> SequenceModel:
    """GAM's blocks with a layer of attention in place of every second one."""
    alternating = ("gam", f"attention(n_heads={config.n_heads})") * config.n_layers
    return _model(config, config.pattern or ", ".join(alternating[: config.n_layers]))
