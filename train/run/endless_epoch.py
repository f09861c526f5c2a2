"""Training data as one endless epoch."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from zoo.errors import UserError
from zoo.train.contracts import schema_of
from zoo.train.tasks.task import Task

__all__ = ["Endless", "EndlessData"]


class Endless:
    """Iterates a loader again and again; the loader itself turns its epochs over.

    Lightning sees a single epoch that never ends, so that a run is counted in steps alone and a restart is always in
    the middle of that epoch: the case Lightning restores exactly. The length is a fiction that keeps it from fetching
    one batch ahead, which would put the loader's position one batch past what was trained on; Lightning sums it over
    ranks in 64 bits.

    Args:
        loader: makes iterators of batches.
        look_ahead: called with the batches of each update before the first of them; None for nobody.
        together: how many batches make an update. A checkpoint falls between two, when what was read ahead is used up.
    """

    def __init__(
        self, loader: Any, look_ahead: Callable[[Sequence[Any]], None] | None = None, together: int = 1
    ) -> None:
        self.loader, self.look_ahead, self.together = loader, look_ahead, together

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches()
        if self.look_ahead is None:
            yield from batches
            return
        while True:
            ahead = list(itertools.islice(batches, self.together))
            self.look_ahead(ahead)
            yield from ahead

    def _batches(self) -> Iterator[Any]:
        while True:
            # Making a DataLoader's iterator draws a seed from torch's generator, which belongs to the model: a resumed
            # run makes one more iterator than an uninterrupted one.
            rng = torch.get_rng_state()
            iterator = iter(self.loader)
            torch.set_rng_state(rng)
            empty = True
            for batch in iterator:
                empty = False
                yield batch
            if empty:
                raise UserError("the training data hold no batch; give more text or a shorter data.seq_len")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take up."""


class EndlessData(LightningDataModule):
    """A data module whose training loader never ends; everything else is the inner module's.

    Args:
        inner: the data.
        task: of several losses, told the batches of each update ahead where there are several; None where it is not
            to be told.
    """

    def __init__(self, inner: LightningDataModule, task: Task | None = None) -> None:
        super().__init__()
        self.inner, self.task = inner, task

    @property
    def schema(self) -> Any:
        """The inner module's, None where it has none."""
        return schema_of(self.inner)

    def prepare_data(self) -> None:
        """Download and cache what the inner module needs, once a machine."""
        self.inner.prepare_data()

    def setup(self, stage: str) -> None:
        """The inner module's, which may look at the trainer."""
        self.inner.trainer = self.trainer
        self.inner.setup(stage)

    def teardown(self, stage: str) -> None:
        """End the inner module's part in the stage, as "fit"."""
        self.inner.teardown(stage)

    def train_dataloader(self) -> Endless:
        """The inner module's training loader, begun again whenever it ends."""
        together = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if self.task is None or not self.task.loss_names or together == 1:
            return Endless(self.inner.train_dataloader())
        return Endless(self.inner.train_dataloader(), self.task.look_ahead, together)

    def val_dataloader(self) -> Any:
        """The inner module's loaders for validation, which do end."""
        return self.inner.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the host, after what the inner module does to it there."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch on the device, after what the inner module does to it there."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """The inner module's position."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position up."""
        self.inner.load_state_dict(state_dict)
