"""The typed call of a `torch.autograd.Function`, whose `apply` torch leaves without annotations."""

from collections.abc import Callable
from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: object) -> Any:
    """`function.apply(*args)`: what its `forward` returns, as a node of the graph; the caller says of which type."""
    run: Callable[..., Any] = function.apply
    return run(*args)
