"""ViT: a transformer over the patches of a picture."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import BidirectionalAttention, VisionConfig, VisionModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """Fields of zoo.layers.VisionConfig, the heads, and mixers in place of attention."""

    n_heads: Annotated[int, Range(1)] = 3
    pattern: str = ""  # mixers by layer, for one stage; empty for attention everywhere

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern and self.depths:
            raise ValueError(f"a pattern makes mixers of one width, for one stage; got {self.pattern!r} with depths")


_DIGITS = {"image_size": 8, "patch_size": 2, "channels": 1}  # scikit-learn's: 16 patches of 2 x 2


@register(
    "vit",
    config=ViTConfig,
    sizes={
        "tiny": {"d_model": 64, "n_layers": 4, "n_heads": 4, "n_classes": 10, **_DIGITS},
        "ti": {},
        "s": {"d_model": 384, "n_heads": 6},
        "b": {"d_model": 768, "n_heads": 12},
    },
    task="image_classification",
    data="digits_images",
    decoder=None,
    produces="classes",
    tags=("attention", "bidirectional", "vision"),
    paper="Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929; sizes of Touvron et al., 2012.12877",
)
def vit(config: ViTConfig) -> VisionModel:
    """Attention over patches, with a class token."""
    attention = partial(BidirectionalAttention, n_heads=config.n_heads, rope_base=None, bias=True)
    if config.pattern:
        own = {"bidirectional_attention": attention}
        return VisionModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern, own))
    return VisionModel(config, lambda i: attention(config.width(config.stage_of(i))))
