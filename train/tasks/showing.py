"""The model as it is shown: in eval mode, without gradients, and afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Inside, the model is in eval mode and nothing has a gradient; its mode comes back at the end.

    Yields:
        the device of the model's parameters, where its inputs must be.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)
