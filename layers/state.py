"""States are nested tuples of tensors; what is done to all of them alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
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


def select(state: State, rows: Tensor) -> State:
    """Rows of a state by their numbers (n,): beams, forks, dropped rows. Every tensor is new."""
    return map_state(lambda x: x.index_select(0, rows.to(x.device)), state)


def repeat(state: State, k: int) -> State:
    """Each row k times, side by side."""
    return map_state(lambda x: x.repeat_interleave(k, dim=0), state)


def join(states: Sequence[State]) -> State:
    """The rows of several states of one model as one state; caches get as many slots as the longest has."""
    first = states[0]
    if isinstance(first, Tensor):
        most = [max(sizes) for sizes in zip(*(x.shape[1:] for x in states), strict=True)]
        return torch.cat([_widened(x, most) for x in states])
    parts = [join(part) for part in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def flatten(state: State) -> dict[str, Tensor]:
    """{"3.memory": tensor}: field names of named tuples, indices of others, joined by dots."""
    if isinstance(state, Tensor):
        return {"": state}
    names = getattr(state, "_fields", None) or [str(i) for i in range(len(state))]
    return {
        f"{name}.{inner}".rstrip("."): tensor
        for name, part in zip(names, state, strict=True)
        for inner, tensor in flatten(part).items()
    }


def unflatten(like: State, tensors: Mapping[str, Tensor]) -> State:
    """The state nested as `like`, from what `flatten` gave.

    Raises:
        KeyError: a tensor is missing.
    """
    names = iter(flatten(like))
    return map_state(lambda _: tensors[next(names)], like)


def _widened(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind every dimension but the first, up to these sizes."""
    pads = [n for size, m in zip(reversed(sizes), reversed(x.shape[1:]), strict=True) for n in (0, size - m)]
    return nn.functional.pad(x, pads)


class Prefixes(Protocol):
    """What one call left behind: the state after any prefix of its tokens."""

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens that each row was given."""
        ...

    def at(self, n: Tensor, /) -> State:
        """The state after the first n[b] tokens of each row, (B,) with 0 <= n <= lengths; may be called again."""
        ...

    def nbytes(self) -> int:
        """Bytes held for it, beside a state."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """An optional capability of a mixer: it has a cheaper way back than running again.

    Attention and short convolutions crop what they hold. A linear recurrence can keep records of its writes (a log),
    and sum up those of the prefix.
    """

    def look_ahead(self, x: Tensor, state: Any, *, cu_seqlens: Tensor) -> tuple[Tensor, Prefixes]:
        """y (1, n, D) of packed documents, one a row of the state, and the states after their prefixes."""
        ...


class Replay:
    """The way back of any mixer: its input is kept, and run again over the prefix.

    Args:
        mixer: (x, state, cu_seqlens=) -> (y, state).
        x: (1, n, D), packed documents, one a row.
        state: before the call, B rows.
        after: the state that the call returned.
        cu_seqlens: boundaries (B + 1,).
    """

    def __init__(self, mixer: nn.Module, x: Tensor, state: State, after: State, cu_seqlens: Tensor):
        self.mixer, self.x, self.state, self.after, self.cu_seqlens = mixer, x, state, after, cu_seqlens
        self.lengths = cu_seqlens.diff().long()

    def at(self, n: Tensor) -> State:
        """The state after the first n[b] tokens; what is there already is not computed again."""
        if bool((n == self.lengths).all()):
            return self.after
        if not bool(n.any()):
            return self.state
        row = torch.repeat_interleave(torch.arange(len(n), device=n.device), self.lengths)
        step = torch.arange(self.x.shape[1], device=n.device) - self.cu_seqlens[row]
        cuts = torch.cat([n.new_zeros(1), n.cumsum(0)])
        _, state = self.mixer(self.x[:, step < n[row]], self.state, cu_seqlens=cuts)
        return state

    def nbytes(self) -> int:
        """Bytes held beside a state: the input of the call and the state before it."""
        return self.x.numel() * self.x.element_size() + state_bytes(self.state)


def look_ahead(mixer: nn.Module, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, Prefixes]:
    """Run a mixer and keep the way back to the state after any prefix: the mixer's own, or `Replay`.

    Args:
        mixer: (x, state, cu_seqlens=) -> (y, state).
        x: (1, n, D), packed documents, one for each row of the state; empty ones are allowed.
        state: before the call, not None.
        cu_seqlens: boundaries (B + 1,).

    Returns:
        y (1, n, D) and the prefixes.
    """
    if isinstance(mixer, LooksAhead):
        return mixer.look_ahead(x, state, cu_seqlens=cu_seqlens)
    y, after = mixer(x, state, cu_seqlens=cu_seqlens)
    return y, Replay(mixer, x, state, after, cu_seqlens)


class LayersPrefixes(NamedTuple):
    """The prefixes of a stack, one of each layer, as one."""

    layers: tuple[Prefixes, ...]
    lengths: Tensor

    def at(self, n: Tensor) -> State:
        """The state of all layers after the first n[b] tokens."""
        return tuple(layer.at(n) for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes held beside a state, over all layers."""
        return sum(layer.nbytes() for layer in self.layers)


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
