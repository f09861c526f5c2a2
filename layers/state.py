"""States are nested tuples of tensors; what is done to all of them alike."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from zoo.ops import shard


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to every tensor of a state and keep its nesting, named tuples included."""
    if isinstance(state, Tensor):
        return function(state)
    mapped = [map_state(function, part) for part in state]
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(state_bytes(part) for part in state)


def detach(state: Any) -> Any:
    """Cut the graph behind a state: truncated back-propagation through time."""
    return map_state(lambda x: x.detach(), state)


def is_decoding(x: Tensor, backend: str = "auto", cu_seqlens: Tensor | None = None) -> bool:
    """One float32 or float64 token on a CPU, outside autograd, autocast, a shard and packed documents.

    There most of a layer's time goes into the way to the arithmetic, and a mixer may call the torch form's steps of its
    operators itself, on a state that `fits`: what does not fit takes the way on which it is refused.
    """
    return (
        x.shape[1] == 1
        and cu_seqlens is None
        and backend in ("auto", "torch")
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and shard.current() is None
    )


def fits(state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> TypeGuard[Tensor]:
    """A state that an operator's step takes as it is."""
    return state is not None and state.shape == shape and state.dtype == dtype


def refuse_state(what: str, state: Any) -> None:
    """What sees both sides of a token cannot go on where another call ended.

    Raises:
        ValueError: a state was given.
    """
    if state is not None:
        raise ValueError(
            f"{what} sees both sides of every token and carries no state, but was given one; "
            "pass the whole sequence in one call, without a state"
        )
