"""States are nested tuples of tensors; what is done to all of them alike."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

State = Any  # nested tuples of tensors, rows first in every tensor


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


@runtime_checkable
class Reserves(Protocol):
    """An optional capability of a mixer whose state grows with the text."""

    def reserve(self, state: Any, slots: int, /) -> Any:
        """The state with room for `slots` tokens a row; the caller owns it, and calls write into its free slots."""
        ...


def reserve(mixer: nn.Module, state: State, slots: int) -> State:
    """The state of a mixer with room for `slots` tokens a row; that of a mixer without a cache as it is."""
    return mixer.reserve(state, slots) if isinstance(mixer, Reserves) else state


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
