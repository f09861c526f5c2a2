"""An arm that reaches and grasps, shown by a scripted expert: robot data that need no simulator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from zoo import codecs
from zoo.codecs import BinsCodec, BSplineCodec, Codec, FASTCodec
from zoo.codecs.codec import DESCRIPTION
from zoo.errors import UsageError, UserError, remedy
from zoo.ranges import Range
from zoo.train.data.core.base import DataModule, Part, at_least
from zoo.train.data.core.corpus import order
from zoo.train.data.core.loader import Batch, Source
from zoo.train.data.robots.action_tokens import ActionTokens
from zoo.train.data.robots.arm import Arm
from zoo.train.data.robots.world import World
from zoo.train.data.synthetic._philox import Draws

__all__ = ["Reaching"]

TRAINING, VALIDATION, TRIALS = 0, 1, 2  # streams of one seed that never meet
CODECS = ("bspline", "fast", "bins")
STARTS = 40  # steps of an episode at which a chunk begins; the expert has grasped by then
SHAKE = 0.5  # the arm is pushed by up to this, so that the expert is seen to mend errors


class Reaching(DataModule):
    """Demonstrations of `Arm`: what the expert sees, and what it would do in the next `chunk` steps.

    Between two chunks the arm is pushed at random, so that the expert is also seen where it would not go by itself.

    A batch holds "observations" (B, 1, 9) float32; "targets" (B, J) int64, the chunk in the tokens of the codec, -100
    behind its end and in rows that only fill up; "actions" (B, chunk, 3) float32, the same chunk as it is.

    The codec is fitted on the training demonstrations, kept, and stored with the model.

    Args:
        codec: "bspline", "fast" or "bins"; or a folder with a codec, as a finished run has one.
        chunk: T, actions of a chunk, of 50 ms each.
        n_controls: control points of every dimension, for bspline.
        degree: of its curves.
        bins: of bspline and bins.
        episodes: demonstrations to learn from.
        val_episodes: demonstrations of validation.
        batch_size: chunks per step and rank.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed.
    """

    schema: Mapping[str, Part] = {"observations": "same", "targets": "same", "actions": "same"}

    def __init__(
        self,
        *,
        codec: str = "bspline",
        chunk: Annotated[int, Range(2)] = 20,
        n_controls: Annotated[int, Range(1)] = 5,
        degree: Annotated[int, Range(0)] = 3,
        bins: Annotated[int, Range(2)] = 256,
        episodes: int = 500,
        val_episodes: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least("chunk", chunk, 2)
        at_least("episodes", episodes, 1)
        at_least("val_episodes", val_episodes, 1)
        self.chunk, self.episodes, self.val_episodes = chunk, episodes, val_episodes
        self.world: World = Arm()
        self.codec = self._codec(codec, n_controls, degree, bins)
        self._fixed = Path(codec).is_dir()
        self._tokens: ActionTokens | None = None

    def _codec(self, name: str, n_controls: int, degree: int, bins: int) -> Codec:
        if name == "bspline":
            return BSplineCodec(
                self.chunk, n_controls=n_controls, degree=degree, bins=bins, grippers=self.world.grippers
            )
        if name == "fast":
            return FASTCodec(self.chunk)
        if name == "bins":
            return BinsCodec(bins)
        if not (Path(name) / DESCRIPTION).is_file():
            raise UsageError(
                f"data.codec is {', '.join(CODECS)} or a folder with {DESCRIPTION}; got {name!r}"
                f"{remedy(name, CODECS, 'name one of these')}"
            )
        return codecs.load(name)

    @property
    def tokens(self) -> ActionTokens:
        """Chunks as rows of ids."""
        if self._tokens is None:
            self.sources  # noqa: B018  (fits the codec)
        assert self._tokens is not None
        return self._tokens

    def make_sources(self) -> tuple[Source, Source]:
        """Demonstrations of the training and of the validation stream."""
        shown = [self._demonstrations(TRAINING, self.episodes), self._demonstrations(VALIDATION, self.val_episodes)]
        chunks = list(shown[0][1].unbind(0))
        if not self._fixed:
            self.codec.fit(chunks)
        try:
            self._tokens = tokens = ActionTokens(self.codec, chunks)
        except UserError as error:
            raise UserError(f"the codec in data.codec is of other actions: {error}") from error
        train, held_out = (
            (observations, tokens.targets(list(actions.unbind(0))), actions) for observations, actions in shown
        )
        return Chunks(*train, self.batch_size, self.seed), Chunks(*held_out, self.batch_size, None)

    def trial_beginnings(self, number: int) -> np.ndarray:
        """Random numbers (number, 8) from which a policy is tried, the same for every seed."""
        return Draws(0, TRIALS, np.arange(number)).uniform(8)

    def _demonstrations(self, stream: int, number: int) -> tuple[Tensor, Tensor]:
        """Observations (number x STARTS, 1, O) and the chunks from there on (number x STARTS, T, D)."""
        world, width = self.world, self.world.action_size
        draws = Draws(self.seed, stream, np.arange(number))
        state = world.begin(draws.uniform(8))
        pushes = torch.from_numpy(SHAKE * (2 * draws.uniform(STARTS * width) - 1)).float().unflatten(1, (STARTS, width))
        pushes[..., list(world.grippers)] = 0
        states = []
        for push in pushes.unbind(1):
            states.append(state)
            state = world.step(state, world.expert(state) + push)
        ahead = type(state)(*(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*states, strict=True)))
        observations, chunk = world.observe(ahead).unsqueeze(1), []
        for _ in range(self.chunk):
            chunk.append(world.expert(ahead))
            ahead = world.step(ahead, chunk[-1])
        return observations, torch.stack(chunk, 1)


class Chunks:
    """Pairs of observation and chunk, shuffled in training.

    Args:
        observations: (N, 1, O).
        targets: (N, J).
        actions: (N, T, D).
        batch_size: per step and rank.
        seed: of the order; None for validation.
    """

    def __init__(self, observations: Tensor, targets: Tensor, actions: Tensor, batch_size: int, seed: int | None):
        self.observations, self.targets, self.actions = observations, targets, actions
        self.batch_size, self.seed = batch_size, seed

    def steps(self, world: int) -> int:
        """Full steps in training, all in validation."""
        each = self.batch_size * world
        return len(self.targets) // each if self.seed is not None else -(-len(self.targets) // each)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """Rows rank, rank + world, ... of the step's."""
        rows = (step * self.batch_size + np.arange(self.batch_size)) * world + rank
        there = rows < len(self.targets)
        rows = np.where(there, rows, 0)
        if self.seed is not None:
            rows = order(len(self.targets), self.seed, epoch)[rows]
        chosen = torch.from_numpy(rows)
        targets = torch.where(torch.from_numpy(there)[:, None], self.targets[chosen], -100)
        return {"observations": self.observations[chosen], "targets": targets, "actions": self.actions[chosen]}
