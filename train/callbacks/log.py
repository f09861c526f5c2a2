"""Rows of numbers, every so many updates and after every validation, to the loggers and to whoever watches."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.train.callbacks.limits import update_done
from zoo.train.run.loggers import CsvLog
from zoo.train.tasks.task import Task

__all__ = ["LogMetrics", "row_due"]


def row_due(step: int, every: int) -> bool:
    """Whether `step` has a training row: every multiple of `every`, and before it 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    The early rows say at once that a run learns, and they are the plot of a short one.
    """
    if step >= every:
        return step % every == 0
    power = step & -step  # the largest power of two that divides it
    return step > 0 and step // power in (1, 3)


class LogMetrics(Callback):
    """Asks the task for a row when `row_due` says so, so that the device is read only then.

    Args:
        every: updates between two rows, but for the early ones.
        table: the run's metrics.csv, whose length is part of the run's state; None to do without.
        show: called with (step, row) for each row, on rank 0.
    """

    def __init__(self, every: int, table: CsvLog | None, show: Callable[[int, dict[str, float]], None]) -> None:
        self.every = every
        self.table = table
        self.show = show
        self.final: dict[str, float] = {}
        self._validation_began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What is measured for a row alone is measured in the update before it."""
        assert isinstance(pl_module, Task)
        pl_module.watch(row_due(trainer.global_step + 1, self.every))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A training row, when it is time, and always a last one."""
        step = trainer.global_step
        if update_done(trainer, batch_idx) and (row_due(step, self.every) or trainer.should_stop):
            assert isinstance(pl_module, Task)
            self._log(trainer, step, pl_module.training_row())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        self._validation_began = time.monotonic()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the task's row of validation, and take the validation's seconds out of the training speed."""
        if trainer.sanity_checking or (not trainer.training and trainer.state.fn != "fit"):
            return
        assert isinstance(pl_module, Task)
        self.final = pl_module.validation_row()
        self._log(trainer, trainer.global_step, self.final)
        pl_module.pause(time.monotonic() - self._validation_began)

    def state_dict(self) -> dict[str, Any]:
        """How long the table is now, and the newest validation."""
        return {"table_size": self.table.size() if self.table else 0, "final": dict(self.final)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut off the rows that the resumed run will write again."""
        self.final = dict(state_dict["final"])
        if self.table:
            self.table.truncate(state_dict["table_size"])

    def _log(self, trainer: Trainer, step: int, row: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
        if trainer.is_global_zero:
            self.show(step, row)
