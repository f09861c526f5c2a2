"""BEAST: a chunk of actions as control points of splines, all predicted in one pass."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import BidirectionalAttention, layer_mixers
from zoo.layers.policy import PolicyConfig, SlotPolicy
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class BeastConfig(PolicyConfig):
    """Fields of PolicyConfig, heads, and mixers by layer."""

    n_heads: Annotated[int, Range(1)] = 8
    pattern: str = ""  # mixers that see both sides, by layer; empty for attention everywhere


@register(
    "beast",
    config=BeastConfig,
    sizes={"tiny": {"d_model": 128, "n_layers": 3, "n_heads": 4, "dropout": 0.0}, "base": {}},
    task="imitation",
    data="reaching",
    decoder=None,
    produces="actions",
    tags=("attention", "bidirectional", "robots", "policy"),
    paper="Zhou et al., BEAST, arXiv 2506.06072 (BEAST-D without its encoders of pictures and text)",
)
def beast(config: BeastConfig) -> SlotPolicy:
    """Learnt slots beside the observations, and attention of all to all."""
    own = {"bidirectional_attention": partial(BidirectionalAttention, n_heads=config.n_heads)}
    return SlotPolicy(
        config, layer_mixers(config.d_model, config.n_layers, config.pattern or "bidirectional_attention", own)
    )
