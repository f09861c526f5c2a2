"""What a simulated world of robots is: many side by side, a pure function of state and action."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

__all__ = ["World"]


class World(Protocol):
    """A world of which B copies run side by side. Nothing in it moves by itself: a state is a
    named tuple of tensors, whose first dimension is B.

    Attributes:
        observation_size, action_size: numbers of an observation and of an action.
        grippers: dimensions of the actions that open and close.
        horizon: steps of an episode.
    """

    observation_size: int
    action_size: int
    grippers: tuple[int, ...]
    horizon: int

    def begin(self, numbers: np.ndarray) -> Any:
        """The states of B episodes from (B, 8) random numbers in (0, 1)."""
        ...

    def observe(self, state: Any) -> Tensor:
        """What the robots see, (B, observation_size) float32."""
        ...

    def step(self, state: Any, actions: Tensor) -> Any:
        """The states after actions (B, action_size)."""
        ...

    def expert(self, state: Any) -> Tensor:
        """What one should do, (B, action_size) float32."""
        ...

    def succeeded(self, state: Any) -> Tensor:
        """Which episodes are done as they should be, (B,) bool."""
        ...

    def place(self, state: Any) -> Tensor:
        """Points to draw, (B, n, 2) in [-1, 1]: the joints from the base to the tip, and then the target."""
        ...
