"""SDAR: Qwen3's decoder, trained and decoded by block diffusion."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import Attention, BlockDiffusionConfig, SequenceModel
from zoo.ranges import Range
from zoo.registry import register

QWEN = {"vocab_size": 151936, "mask_token_id": 151669, "head_dim": 128, "n_kv_heads": 8}


@dataclass(frozen=True, kw_only=True)
class SDARConfig(BlockDiffusionConfig):
    """Settings of SDAR; those of the mixer are explained at `zoo.layers.Attention`."""

    n_heads: Annotated[int, Range(1)] = 4
    n_kv_heads: Annotated[int | None, Range(1)] = None  # None: as many as n_heads
    head_dim: Annotated[int | None, Range(1)] = None  # None: d_model / n_heads
    rope_base: Annotated[float, Range(above=0)] = 1e6
    qk_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern:
            raise ValueError(f"pattern must be empty, SDAR has attention in every layer; got {self.pattern!r}")
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id must be below vocab_size = {self.vocab_size}; got {self.mask_token_id}, raise "
                "vocab_size, or set mask_token_id=null for its last token"
            )


@register(
    "sdar",
    config=SDARConfig,
    sizes={
        "tiny": {"hidden_size": 256, "n_kv_heads": 2, "vocab_size": 258},
        "1.7b": QWEN | {"d_model": 2048, "n_layers": 28, "n_heads": 16, "hidden_size": 6144},
        "4b": QWEN | {"d_model": 2560, "n_layers": 36, "n_heads": 32, "hidden_size": 9728},
        "8b": QWEN | {"d_model": 4096, "n_layers": 36, "n_heads": 32, "hidden_size": 12288},
    },
    task="block_diffusion",
    data="pydocs",
    decoder="block_diffusion",
    produces="text",
    tags=("attention", "causal", "diffusion"),
    paper="Cheng, Bian, Liu et al., SDAR, arXiv 2510.06303; Arriola et al., Block Diffusion, arXiv 2503.09573",
)
def sdar(config: SDARConfig) -> SequenceModel:
    """Blocks one after the other, denoised inside; the weights are Qwen3's."""
    attention = partial(
        Attention,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
    )
    return SequenceModel(config, lambda _: attention(config.d_model))
