"""Batches of sequences as plans: the same on every rank without a word between them.

A plan is a pure function of (lengths, planner, settings, seed, epoch, step), so that a position is all there is to
save, workers may plan ahead of training (`plan(epoch, step)`; the planner then does not hold the training process up),
and ranks need only compare digests now and then (`zoo.train.balance.execute.agree`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from zoo.train.balance.plan import Plan, as_lengths


class Planner(Protocol):
    """Lengths of a batch -> its plan; Flexible, Uniform, Hybrid, PackedStream. Its repr says all that it depends on."""

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """Plan a batch."""
        ...


class BalancedBatchSampler:
    """Every sequence once per epoch, in random batches of about `global_tokens` tokens, each with its plan.

    Iterating yields plans from the position on to the end of the epoch; the next pass is the next epoch. The plans'
    documents are positions in `lengths`, and `plan.for_rank(r)` are the micro-steps of a rank. Steps that are
    exchangeable (lockstep) are shuffled within a batch, since micro-batches sorted by length tie content to order.

    Args:
        lengths: tokens of every sequence of the data set.
        planner: makes a plan of a batch.
        global_tokens: a batch ends before the sequence that would take it beyond this many; a longer sequence makes a
            batch alone.
        seed: of the order.

    Raises:
        ValueError: lengths are not whole numbers of at least 1, or the longest sequence fits no plan.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, planner: Planner, global_tokens: int, seed: int = 0):
        self.lengths, self.planner, self.global_tokens, self.seed = as_lengths(lengths), planner, global_tokens, seed
        if global_tokens < 1:
            raise ValueError(f"BalancedBatchSampler: global_tokens must be at least 1; got {global_tokens}")
        planner([int(self.lengths.max())])  # what does not fit is refused now and not in the middle of an epoch
        self._epoch = self._step = 0
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None  # (epoch, its order, where batches begin)

    def batches(self, epoch: int) -> int:
        """Batches of an epoch; epochs differ a little, since batches are filled by tokens."""
        return len(self._epoch_order(epoch)[1]) - 1

    def __len__(self) -> int:
        """Batches of the epoch at the position."""
        return self.batches(self._epoch)

    def documents(self, epoch: int, step: int) -> np.ndarray:
        """The sequences of a batch, as positions in `lengths`: whatever the planner."""
        order, cuts = self._epoch_order(epoch)
        return order[cuts[step] : cuts[step + 1]]

    def plan(self, epoch: int, step: int) -> Plan:
        """The plan of a batch: a pure function of its arguments."""
        documents = self.documents(epoch, step)
        plan = self.planner(self.lengths[documents]).named(documents.tolist())
        if not plan.lockstep:
            return plan  # its order is a schedule
        return plan.reordered(np.random.default_rng([self.seed, epoch, step, 1]).permutation(len(plan.steps)).tolist())

    def __iter__(self) -> Iterator[Plan]:
        epoch, step = self._epoch, self._step
        while step < self.batches(epoch):
            plan = self.plan(epoch, step)
            step += 1
            # the position is that of the batches handed out, saved while this one is worked on it counts as done
            self._epoch, self._step = (epoch, step) if step < self.batches(epoch) else (epoch + 1, 0)
            yield plan

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on."""
        return {"epoch": self._epoch, "step": self._step, "settings": self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ValueError: it was saved with other lengths or settings, so that sequences would be dropped or repeated.
        """
        if state["settings"] != self.settings():
            raise ValueError(
                "BalancedBatchSampler: the position belongs to other lengths, global_tokens or seed; sequences would "
                "be dropped or repeated: give what it was saved with, or start a new epoch"
            )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def settings(self) -> str:
        """A hash of what the order depends on.

        The planner is left out: a refitted cost model or other ranks plan the same batches anew.
        """
        said = (self.global_tokens, self.seed, len(self.lengths))
        return hashlib.sha256(repr(said).encode() + self.lengths.tobytes()).hexdigest()

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.lengths))
            total = np.concatenate([[0], np.cumsum(self.lengths[order])])
            cuts = [0]
            while cuts[-1] < len(order):
                end = int(np.searchsorted(total, total[cuts[-1]] + self.global_tokens, side="right")) - 1
                cuts.append(max(end, cuts[-1] + 1))
            self._order = (epoch, order, np.array(cuts))
        return self._order[1:]
