"""How a backbone's weights start: one rule for linear layers and embeddings, and what a layer says of itself."""

from torch import nn

from zoo.layers.conv import ShortConvolution
from zoo.layers.mixer import Initialises

__all__ = ["initialise"]


def initialise(model: nn.Module, *, std: float, n_layers: int, convolutions: bool = True) -> None:
    """Start every linear and embedding weight from a normal distribution, biases from 0; then layers of their own.

    Modules start from the inside out. So a mixer with a start of its own overwrites that of its linear layers.

    Args:
        model: the whole model.
        std: standard deviation.
        n_layers: depth, for layers that shrink with it.
        convolutions: the rule holds for short convolutions as well.
    """

    def start(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) or (convolutions and isinstance(module, ShortConvolution)):
            nn.init.normal_(module.weight, std=std)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Initialises):
            module.initialise(n_layers)

    model.apply(start)
