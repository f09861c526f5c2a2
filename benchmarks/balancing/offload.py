"""How much of a long sequence's activations to move to the host, so that it needs fewer ranks.

Source: ByteScale (arXiv 2502.21231), selective offloading.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Offloaded(NamedTuple):
    """ratio: of the activations of all layers but two that go to the host. ranks: that the sequence then needs."""

    ratio: float
    ranks: int


@dataclass(frozen=True)
class Offload:
    """A rank's layers and its link to the host.

    Args:
        layers: on the rank, at least 3 (two layers' activations stay: the one at work and the one on its way).
        capacity: tokens C that fit on a rank without offloading.
        layer_ms: s -> ms of one layer's forward pass over a sequence of s tokens.
        activations: s -> bytes of one layer's activations.
        bytes_per_ms: of the link, the slower direction.
    """

    layers: int
    capacity: int
    layer_ms: Callable[[int], float]
    activations: Callable[[int], float]
    bytes_per_ms: float

    def ranks(self, tokens: int, ratio: float) -> int:
        """ceil((2 Act(s) + (1 - r)(l - 2) Act(s)) / (l Act(C)))."""
        kept = (2 + (1 - ratio) * (self.layers - 2)) * self.activations(tokens)
        return math.ceil(kept / (self.layers * self.activations(self.capacity)) - 1e-9)

    def __call__(self, tokens: int) -> Offloaded:
        """The fewest ranks with transfers hidden behind the layer's compute, by the least ratio that reaches them.

        Nothing is moved below C tokens, or where what may be hidden is less than one rank's worth of activations.
        """
        act = self.activations(tokens)
        most = min(1.0, self.layer_ms(tokens) * self.bytes_per_ms / act)
        unit = self.layers * self.activations(self.capacity)
        least = min(1.0, unit / ((self.layers - 2) * act))
        if tokens < self.capacity or most < least:
            return Offloaded(0.0, self.ranks(tokens, 0.0))
        ranks = self.ranks(tokens, most)
        if ranks == self.ranks(tokens, 0.0):
            return Offloaded(0.0, ranks)  # moving less than a rank's worth frees none
        enough = (self.layers - ranks * unit / act) / (self.layers - 2)  # r at which exactly `ranks` are full
        return Offloaded(min(most, max(least, enough)), ranks)
