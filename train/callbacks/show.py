"""Something of the model to look at, from time to time: a text, a sheet of pictures."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from zoo.train.callbacks.limits import update_done
from zoo.train.rng import get_rng_states, set_rng_states
from zoo.train.tasks.task import Task

__all__ = ["ShowSamples"]


class ShowSamples(Callback):
    """Says what the task shows of the model every `every` updates; the one at the end belongs to the run's report.

    Args:
        every: updates between two samples, 0 for none.
        show: (model, step) -> what to say, None for nothing.
        say: called with it.
    """

    def __init__(
        self, every: int, show: Callable[[nn.Module, int | None], str | None], say: Callable[[str], None]
    ) -> None:
        self.every = every
        self.show = show
        self.say = say

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show when it is time: on every rank, since weights may be cut across them and none could go on alone."""
        step = trainer.global_step
        due = self.every and step % self.every == 0 and update_done(trainer, batch_idx) and not trainer.should_stop
        if due:
            assert isinstance(pl_module, Task)
            start, states = time.monotonic(), get_rng_states()
            try:
                text = self.show(pl_module.model, step)
            finally:
                set_rng_states(states)
            if text is not None:
                self.say(text)
            pl_module.pause(time.monotonic() - start)
