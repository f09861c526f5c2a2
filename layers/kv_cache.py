"""The key-value cache of attention: slots that are filled from the left, with a length for each row.

    slots     0    1    2    3    4    5
    row 0   [ k0   k1   k2   k3   .    .  ]   length 4
    row 1   [ k0   k1   .    .    .    .  ]   length 2

Slots behind a row's length hold anything finite, and no query sees them. So taking tokens back is a smaller length.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.layers.state import State

__all__ = [
    "AttentionSlots",
    "AttentionState",
    "KeyValues",
    "append",
    "begin",
    "reserve",
    "reserve_window",
    "trimmed",
    "values",
]

STEP = 64  # slots: capacities are multiples of it. Not tuned: it keeps short caches from growing at every token.


class AttentionState(NamedTuple):
    """The cache of one attention layer as a value: a call copies it and never writes into it.

    Row b holds its newest min(length[b], M) keys in the first slots. A layer with a window has M < window, or
    M = window where `reserve_window` made room for the next token.

    k, v: (B, M, Hk, K), keys already rotated; length: (B,) int64, tokens seen so far.
    """

    k: Tensor
    v: Tensor
    length: Tensor


class AttentionSlots(NamedTuple):
    """As AttentionState, but owned by one holder: a call writes its keys into the free slots behind `length`.

    What lies before `length` never changes. So the holder may keep older lengths of the same slots, and go on from one
    of them. `reserve` makes room, and `values` gives the value that others may keep.
    """

    k: Tensor
    v: Tensor
    length: Tensor


Cache = AttentionState | AttentionSlots


class KeyValues(NamedTuple):
    """The slots after a call's keys were written, and so the state after any prefix of its tokens (`Prefixes`).

    Args:
        k, v: (B, S, Hk, K), old keys and those of the call.
        filled: (B,), slots that were full before the call.
        past: (B,), tokens seen before the call.
        lengths: (B,), tokens of the call.
        kind: class of the states.
        keep: slots that a state keeps at most; None for all.
        fits: every row has all tokens of the call, and the slots are those that a state keeps.
    """

    k: Tensor
    v: Tensor
    filled: Tensor
    past: Tensor
    lengths: Tensor
    kind: type[AttentionState] | type[AttentionSlots]
    keep: int | None
    fits: bool = False

    def at(self, n: Tensor) -> Cache:
        """The state after the first n[b] tokens of the call, 0 <= n <= lengths."""
        k, v = self.k, self.v
        if self.keep is not None and k.shape[1] > self.keep:
            first = (self.filled + n - self.keep).clamp(min=0)
            slots = first[:, None] + torch.arange(self.keep, device=k.device)
            k, v = taken(k, slots), taken(v, slots)
        return self.kind(k, v, self.past + n)

    def last(self) -> Cache:
        """The state after all tokens of the call."""
        return self.kind(self.k, self.v, self.past + self.lengths) if self.fits else self.at(self.lengths)

    def nbytes(self) -> int:
        """Bytes held beside those of a state: only a window's slots must wait until they can be dropped."""
        extra = 0 if self.keep is None else max(0, self.k.shape[1] - self.keep)
        return 2 * extra * self.k[:, :1].numel() * self.k.element_size()


def begin(k: Tensor, v: Tensor, past: Tensor | None, lengths: Tensor, keep: int | None) -> KeyValues:
    """The slots of rows that had no keys: (B, T, Hk, K) of a call, as they are."""
    zeros = torch.zeros_like(lengths)
    past = zeros if past is None else past
    return KeyValues(k, v, zeros, past, lengths, AttentionState, keep)


def append(cache: Cache, k: Tensor, v: Tensor, lengths: Tensor | None, keep: int | None) -> KeyValues:
    """Write keys (B, T, Hk, K) behind those of each row; of row b the first lengths[b] count, all where it is None."""
    T, M = k.shape[1], cache.k.shape[1]
    filled = cache.length.clamp(max=M)
    if isinstance(cache, AttentionSlots):
        rooms = [cache.k, cache.v]
    elif keep is None or keep >= M:
        rooms = [F.pad(x, (0, 0, 0, 0, 0, T)) for x in (cache.k, cache.v)]
    else:  # a full window drops its oldest key first, so that old and new keys are copied once
        dropped = (filled - keep).clamp(min=0)
        source = (dropped[:, None] + torch.arange(keep + T, device=k.device)).clamp(max=M - 1)
        rooms, filled = [taken(cache.k, source), taken(cache.v, source)], filled - dropped
    slots = filled[:, None] + torch.arange(T, device=k.device)
    for room, new in zip(rooms, (k, v), strict=True):
        room.view(-1, *room.shape[2:]).index_copy_(0, _flat(slots, room.shape[1]), new.flatten(0, 1))
    fits = lengths is None and keep is not None and keep < M and T == 1
    lengths = torch.full_like(filled, T) if lengths is None else lengths
    return KeyValues(rooms[0], rooms[1], filled, cache.length, lengths, type(cache), keep, fits)


def taken(x: Tensor, slots: Tensor) -> Tensor:
    """Slots (B, n) of each row of x (B, S, ...) -> (B, n, ...)."""
    rows = x.flatten(0, 1).index_select(0, _flat(slots, x.shape[1]))
    return rows.view(*slots.shape, *x.shape[2:])


def _flat(slots: Tensor, S: int) -> Tensor:
    """Where slots (B, n) of S a row lie when all rows are one."""
    return (slots + S * torch.arange(len(slots), device=slots.device)[:, None]).flatten()


def reserve(cache: Cache, slots: int) -> AttentionSlots:
    """The cache with room for `slots` tokens a row, to be written in place; copied where it has less.

    Capacity grows by a quarter at least, so that a token's share of all copies is bounded: amortised O(1).
    """
    M = cache.k.shape[1]
    if isinstance(cache, AttentionSlots) and slots <= M:
        return cache
    size = max(slots, M + M // 4)
    more = -(-size // STEP) * STEP - M
    k, v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (cache.k, cache.v))
    return AttentionSlots(k, v, cache.length)


def reserve_window(cache: Cache, window: int) -> AttentionState:
    """The cache of a layer with a window, with a slot for the next token; what lay outside the window is gone."""
    k, v, length = cache
    M = k.shape[1]
    if window <= M:
        return AttentionState(k, v, length)
    gone = length.clamp(max=window) - length.clamp(max=M)  # keys before those that are held, whose slots count as full
    source = (torch.arange(window, device=k.device) - gone[:, None]).clamp(0, max(M - 1, 0))
    if not M:
        k, v = (x.new_zeros(len(x), 1, *x.shape[2:]) for x in (k, v))
    return AttentionState(taken(k, source), taken(v, source), length)


def values(state: State) -> State:
    """A state whose parts are all values: later calls of the holder leave it as it is."""
    return _each(state, lambda cache: AttentionState(*cache))


def trimmed(state: State) -> State:
    """As `values`, without slots that no row has filled."""

    def cut(cache: Cache) -> AttentionState:
        used = min(int(cache.length.max()) if len(cache.length) else 0, cache.k.shape[1])
        return AttentionState(cache.k[:, :used], cache.v[:, :used], cache.length)

    return _each(state, cut)


def _each(state: State, function: Any) -> State:
    if isinstance(state, AttentionState | AttentionSlots):
        return function(state)
    if isinstance(state, Tensor):
        return state
    mapped = [_each(part, function) for part in state]
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)
