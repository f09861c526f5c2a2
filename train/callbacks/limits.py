"""When to stop: the limits of the run and the user's signals, agreed on by all ranks."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.train.clock import Clock
from zoo.train.optim import Limits
from zoo.train.run.interrupt import Interrupts

__all__ = ["StopAtLimits", "update_done"]

AGREE_EVERY = 10  # updates between two exchanges about clocks and signals when there are several ranks


def update_done(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch completed an update (with gradient accumulation not every batch does)."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StopAtLimits(Callback):
    """Asks Lightning to stop after the update that reaches a limit; the last validation still runs.

    Lightning's own `max_steps` would end without it. All ranks read rank 0's clock and any rank's signal.
    """

    def __init__(self, limits: Limits, clock: Clock, interrupts: Interrupts) -> None:
        self.limits = limits
        self.clock = clock
        self.interrupts = interrupts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A finished run that is resumed does no further step."""
        self.interrupts.defer()
        if self.limits.reached(trainer.global_step, self.clock.now):
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set `clock.now` where one process trains; several ranks agree on it after the update."""
        if trainer.world_size == 1:
            self.clock.now = self.clock.elapsed()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when a limit is reached; see to it that all ranks know of clocks and signals."""
        if not update_done(trainer, batch_idx):
            return
        if trainer.world_size == 1:
            self.interrupts.agreed = self.interrupts.requested
        elif trainer.global_step % AGREE_EVERY == 0:
            self.clock.now = trainer.strategy.broadcast(self.clock.elapsed())
            self.interrupts.agreed = trainer.strategy.reduce_boolean_decision(self.interrupts.requested, all=False)
        if self.limits.reached(trainer.global_step, self.clock.now):
            trainer.should_stop = True
