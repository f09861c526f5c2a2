"""The backbone of MEGA and TCNCA: scaled embeddings, blocks whose mixer gates its own residual, LayerNorms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.backbone import SequenceConfig, SequenceModel
from zoo.layers.block import Block
from zoo.layers.dropout import Dropout
from zoo.layers.mixer import FeedForward
from zoo.layers.mixers.mega import GatedChunkedAttention
from zoo.ranges import Range

__all__ = ["MegaModel", "MegaSettings"]


@dataclass(frozen=True, kw_only=True)
class MegaSettings(SequenceConfig):
    """What MEGA and TCNCA share; the mixer's fields are explained at `zoo.layers.Mega`.

    hidden_size: F of the feed-forward; None for E, 0 for no feed-forward.
    dropout: of the embeddings, inside the mixers, and of the feed-forward's inner and outer numbers.
    """

    tie_embeddings: bool = True
    norm_eps: Annotated[float, Range(0)] = 1e-5
    d_key: Annotated[int, Range(2)] = 128  # Z, even
    d_value: Annotated[int | None, Range(1)] = None  # E; None: 2 d_model
    chunk_size: Annotated[int, Range(1)] = 128
    weights: str = "softmax"  # softmax, laplace or relu2
    bias: str = "rotary"  # rotary or simple


class ScaledEmbedding(nn.Embedding):
    """drop(sqrt(D) * embedding): a matrix that starts at D^-0.5 gives numbers of size one, and ties to a head."""

    def __init__(self, vocab_size: int, d_model: int, *, dropout: float = 0.0):
        super().__init__(vocab_size, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """(B, T) integers -> (B, T, D)."""
        y: Tensor = self.dropout(super().forward(input) * self.embedding_dim**0.5)
        return y


class SiLUFeedForward(FeedForward):
    """drop(W_2 drop(silu(W_1 x + b_1)) + b_2), (..., D) -> (..., D).

    Args:
        d_model: D.
        hidden_size: F, rows of W_1.
        dropout: of both.
    """

    def __init__(self, d_model: int, *, hidden_size: int, dropout: float = 0.0):
        super().__init__()
        self.token_wise = dropout == 0  # what drops numbers must know where its tokens stand
        self.up_proj = nn.Linear(d_model, hidden_size)
        self.down_proj = nn.Linear(hidden_size, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), every vector by itself."""
        y: Tensor = self.dropout(self.down_proj(self.dropout(F.silu(self.up_proj(x)))))
        return y


class MegaModel(SequenceModel):
    """MEGA's language model around its mixers, or others in a pattern: a SequenceModel with MEGA's own parts.

    The norm in front of a feed-forward, and of a mixer that does not norm its input itself, is a LayerNorm. The last
    norm has no parameters.

    Args:
        config: a MegaSettings.
        mixer: i -> the mixer of layer i.

    Source: arXiv 2209.10655, and the official code's `mega_lm`.
    """

    def __init__(self, config: MegaSettings, mixer: Callable[[int], nn.Module]):
        d = config.d_model
        words = ScaledEmbedding(config.vocab_size, d, dropout=config.dropout)
        super().__init__(
            config, (_block(config, mixer(i)) for i in range(config.n_layers)), embed=words,
            norm=nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=False),
        )  # fmt: skip
        nn.init.normal_(words.weight, std=d**-0.5)


def _block(config: MegaSettings, mixer: nn.Module) -> Block:
    """A block with LayerNorms; MEGA's mixers have theirs inside, since their residual is a gate on what came in."""
    d, hidden = config.d_model, config.hidden_size
    if hidden is None:
        hidden = 2 * d if config.d_value is None else config.d_value
    block = Block(
        d, mixer, SiLUFeedForward(d, hidden_size=hidden, dropout=config.dropout) if hidden else None,
        residual_scale=config.residual_scale, norm=lambda d: nn.LayerNorm(d, eps=config.norm_eps),
    )  # fmt: skip
    if isinstance(mixer, GatedChunkedAttention):
        block.mixer_norm = nn.Identity()
    return block
