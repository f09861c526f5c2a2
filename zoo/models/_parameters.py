"""Parameter counts without the memory: the model is built on the meta device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def build_on_meta(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """The model with shapes and no numbers."""
    with torch.device("meta"):
        return build(config)


def count_parameters(build: Callable[[Any], nn.Module], config: Any) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in build_on_meta(build, config).parameters())
