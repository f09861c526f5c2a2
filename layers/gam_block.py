"""GAM's block and its start: what its paper's code does otherwise than the other models."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.conv import ShortConvolution
from zoo.layers.feed_forward import MLP

__all__ = ["GAMBlock", "start_as_torch_does"]


class GAMBlock(Block):
    """x + mixer(norm(x)), then y + drop(W_2 gelu(W_1 norm(y))): LayerNorms, and dropout behind the feed-forward alone.

    Args:
        d_model: D.
        mixer: a zoo.layers.Mixer.
        hidden_size: of the feed-forward; 4 D when None, none when 0.
        norm_eps: of the norms.
        dropout: share of the numbers that the feed-forward adds which is dropped in training.
        residual_scale: as for Block.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        *,
        hidden_size: int | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        residual_scale: bool = False,
    ):
        feed_forward = None if hidden_size == 0 else MLP(d_model, hidden_size=hidden_size)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(
            d_model, mixer, feed_forward, norm=norm, dropout=dropout, residual_scale=residual_scale
        )  # fmt: skip

    def _draw(self, x: Tensor) -> Any:
        return super()._draw(x)._replace(mix=(None, None))


def start_as_torch_does(model: nn.Module, positions: nn.Embedding | None) -> None:
    """Start linear layers and convolutions as torch does, and positions from N(0, 1), as GAM's code leaves them.

    Args:
        model: the whole model. An embedding that is tied to the head starts as the head.
        positions: the table of positions, some forty times as large as the vectors of the tokens.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | ShortConvolution):
            module.reset_parameters()
    if positions is not None:
        nn.init.normal_(positions.weight)
