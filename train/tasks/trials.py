"""A policy in its world: it acts, sees what comes of it, and acts again."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.train.data.robots.action_tokens import ActionTokens
from zoo.train.data.robots.world import World

__all__ = ["Trials", "run_trials"]


class Trials(NamedTuple):
    """What came of B episodes.

    succeeded: (B,) bool.
    malformed: how many of the predicted chunks were none. chunks: how many were predicted.
    jerk: the sum of the absolute second differences of the actions around the borders of chunks, without grippers.
    borders: how many numbers that is the sum of.
    places: (steps + 1, B, n, 2), what there is to draw.
    seconds: that the policy took, without its world.
    """

    succeeded: Tensor
    malformed: int
    chunks: int
    jerk: float
    borders: int
    places: Tensor
    seconds: float


@torch.no_grad()
def run_trials(
    act: Callable[[Tensor], Tensor], world: World, tokens: ActionTokens, beginnings: np.ndarray, execute: int
) -> Trials:
    """Run episodes side by side to the horizon of their world.

    Args:
        act: observations (B, 1, O) -> the tokens of a chunk (B, J), on the CPU.
        world: in which to act.
        tokens: what the tokens mean. A robot stands still, with open gripper, for a chunk that is malformed.
        beginnings: (B, 8) numbers in (0, 1).
        execute: how many actions of a chunk are executed before the next one is predicted.
    """
    state: Any = world.begin(beginnings)
    places, done = [world.place(state)], list[Tensor]()
    malformed = chunks = 0
    seconds = 0.0
    while len(done) < world.horizon:
        seen = world.observe(state).unsqueeze(1)
        start = time.perf_counter()
        chunk = tokens.decode(act(seen))
        seconds += time.perf_counter() - start
        malformed, chunks = malformed + int(chunk.malformed.sum()), chunks + len(seen)
        for actions in chunk.actions[:, : min(execute, world.horizon - len(done))].float().unbind(1):
            state = world.step(state, actions)
            done.append(actions)
            places.append(world.place(state))
    jerk, borders = border_jerk(torch.stack(done, 1), world.grippers, execute)
    return Trials(world.succeeded(state), malformed, chunks, jerk, borders, torch.stack(places), seconds)


def border_jerk(actions: Tensor, grippers: tuple[int, ...], execute: int) -> tuple[float, int]:
    """The absolute second differences that reach over a border of chunks: their sum and their number.

    Args:
        actions: (B, steps, D), as they were executed.
        grippers: dimensions that do not count.
        execute: actions of each chunk.
    """
    smooth = [d for d in range(actions.shape[2]) if d not in grippers]
    second = actions[..., smooth].diff(n=2, dim=1).abs()  # entry i is of the actions i, i + 1 and i + 2
    at = torch.arange(second.shape[1])
    over = (at // execute) != ((at + 2) // execute)
    return float(second[:, over].sum()), second[:, over].numel()
