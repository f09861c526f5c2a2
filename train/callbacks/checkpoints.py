"""checkpoints/last.ckpt and best.ckpt, from which a run goes on exactly."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from zoo.train.callbacks.limits import update_done
from zoo.train.rng import get_rng_states, set_rng_states
from zoo.train.run.checkpoint_io import AtomicCheckpointIO, link_over
from zoo.train.run.interrupt import Interrupted, Interrupts
from zoo.train.tasks.task import Task

__all__ = ["Checkpoints"]


class Checkpoints(Checkpoint):
    """Writes last.ckpt every `every` updates, after every validation, at the end and on an interrupt.

    A save always falls between two updates and after the validation that belongs to the update, so that a resumed run
    repeats and skips neither. Weights that are not finite end the run instead of being written. best.ckpt is the save
    with the lowest validation loss. A save that fails leaves the old file, warns once, and the run goes on; `failed`
    says whether the newest save failed.
    """

    def __init__(
        self, folder: Path, every: int, interrupts: Interrupts, io: AtomicCheckpointIO, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.last = folder / "last.ckpt"
        self.best = folder / "best.ckpt"
        self.every = every
        self.interrupts = interrupts
        self.io = io
        self.say = say
        self.best_loss = float("inf")
        self.failed = False
        self._saved_step = -1
        self._rng_states: list[dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the generators of a resumed run back, after everything that Lightning draws while it starts."""
        if self._rng_states is not None:
            if len(self._rng_states) == trainer.world_size:
                set_rng_states(self._rng_states[trainer.global_rank])
            self._rng_states = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, unless a validation comes first."""
        if not update_done(trainer, batch_idx):
            return
        stop = self._stop_requested(trainer)
        if validation_is_next(trainer):
            return
        step = trainer.global_step
        if stop or trainer.should_stop or (self.every and step % self.every == 0):
            self._save(trainer, pl_module)
        if stop:
            raise Interrupted(training=True, saved=not self.failed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and save as the best when it is."""
        batch_idx = trainer.fit_loop.total_batch_idx
        if trainer.sanity_checking or not update_done(trainer, batch_idx):
            return
        loss = float(trainer.callback_metrics["val_loss"])
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss = loss
        self._save(trainer, pl_module)
        if is_best and not self.failed and trainer.is_global_zero:
            try:
                link_over(self.last, self.best)
            except OSError as error:
                self._complain(self.best, error)
        if self._stop_requested(trainer):
            raise Interrupted(training=True, saved=not self.failed)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has not been saved."""
        if self._saved_step != trainer.global_step and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The best loss and the generators of every rank."""
        states = [get_rng_states()]
        if torch.distributed.is_initialized():
            states = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(states, get_rng_states())
        return {"best_loss": self.best_loss, "rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the generators for the first step."""
        self.best_loss = state_dict["best_loss"]
        self._rng_states = state_dict["rng"]

    def _stop_requested(self, trainer: Trainer) -> bool:
        """Whether there was a signal that all ranks know of; a single process also heeds one during validation."""
        return self.interrupts.agreed or (trainer.world_size == 1 and self.interrupts.requested)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.monotonic()
        if isinstance(pl_module, Task):
            pl_module.refuse_nonfinite_weights()
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.last, weights_only=False)
        if self.io.error is not None:
            self._complain(self.last, self.io.error)
        else:
            self.failed = False
        if isinstance(pl_module, Task):
            pl_module.pause(time.monotonic() - start)

    def _complain(self, path: Path, error: OSError) -> None:
        if not self.failed:
            kept = "the one before stays" if path.exists() else "there is none yet"
            why = error.strerror or str(error)
            self.say(f"warning: {path} could not be written ({why}); {kept} and training goes on, free some space")
        self.failed = True


def validation_is_next(trainer: Trainer) -> bool:
    """Whether Lightning validates right after this batch."""
    if not trainer.enable_validation:
        return False
    if trainer.should_stop:
        return True
    every = trainer.val_check_batch
    return every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0
