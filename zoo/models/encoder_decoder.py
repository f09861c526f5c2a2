"""An attention encoder-decoder: one sequence in, another out, as in translation."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Attention, BidirectionalAttention, CrossAttention, EncoderDecoder, layer_mixers
from zoo.layers import EncoderDecoderConfig as Base
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Base):
    """Fields of zoo.layers.EncoderDecoderConfig, heads, rotary base and the mixers of both stacks."""

    n_heads: Annotated[int, Range(1)] = 2
    rope_base: Annotated[float, Range(above=0)] = 10000.0
    pattern: str = ""  # mixers of the decoder by layer; empty for attention everywhere
    encoder_pattern: str = ""  # of the encoder; empty for attention over both sides


@register(
    "encoder_decoder",
    config=EncoderDecoderConfig,
    sizes={
        "tiny": {"d_model": 64, "n_layers": 2, "hidden_size": 128, "vocab_size": 257},
        "base": {"d_model": 512, "n_layers": 6, "n_heads": 8, "tie_embeddings": True},
    },
    task="sequence_to_sequence",
    data="reverse",
    decoder=None,
    produces="series",
    tags=("attention", "causal", "encoder-decoder"),
    paper="Vaswani et al., Attention Is All You Need, arXiv 1706.03762; the blocks of LLaMA, arXiv 2302.13971",
)
def encoder_decoder(config: EncoderDecoderConfig) -> EncoderDecoder:
    """Attention over both sides of the source, causal attention to the target, and attention from one to the other."""
    d, heads, base = config.d_model, config.n_heads, config.rope_base
    both = {"bidirectional_attention": partial(BidirectionalAttention, n_heads=heads, rope_base=base)}
    causal = {"attention": partial(Attention, n_heads=heads, rope_base=base)}
    depth = config.n_layers if config.n_encoder_layers is None else config.n_encoder_layers
    return EncoderDecoder(
        config,
        layer_mixers(d, depth, config.encoder_pattern or "bidirectional_attention", both),
        layer_mixers(d, config.n_layers, config.pattern or "attention", causal),
        lambda i: CrossAttention(d, n_heads=heads),
    )
