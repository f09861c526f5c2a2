"""What a model says that writes its text by blocks."""

from dataclasses import dataclass
from typing import Annotated

from zoo.layers.backbone import SequenceConfig
from zoo.ranges import Range

__all__ = ["BlockDiffusionConfig", "block_size_of", "mask_token_of"]

BLOCK_SIZE = 4  # SDAR's and BD3-LM's smallest


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(SequenceConfig):
    """A SequenceConfig whose model denoises blocks of tokens.

    block_size: tokens that are denoised together; no weight depends on it.
    mask_token_id: the token that hides another; None for the last of the vocabulary.
    """

    block_size: Annotated[int, Range(1)] = BLOCK_SIZE
    mask_token_id: Annotated[int | None, Range(0)] = None


def block_size_of(config: SequenceConfig) -> int:
    """Tokens of a block: what the model says, or 4 where it says nothing."""
    return config.block_size if isinstance(config, BlockDiffusionConfig) else BLOCK_SIZE


def mask_token_of(config: SequenceConfig) -> int:
    """The token that hides another: what the model says, or the last of its vocabulary."""
    own = config.mask_token_id if isinstance(config, BlockDiffusionConfig) else None
    return config.vocab_size - 1 if own is None else own
