"""The memory plan of a run, chosen when the first batch shows its shape; the estimate beside what was measured."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.layers.model import as_model
from zoo.train.memory.choose import MemoryConfig, choose
from zoo.train.memory.estimate import PRECISIONS, size_text
from zoo.train.memory.live_bytes import LiveBytes
from zoo.train.strategies.balanced import Local

__all__ = ["FitMemory"]


class FitMemory(Callback):
    """Sets the model's plan before the first step and reports on it.

    Args:
        config: what the user asked for.
        say: where lines go.

    All ranks take the plan of rank 0: recomputation must be the same on all, since it may gather weights.
    """

    def __init__(self, config: MemoryConfig, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self._started = False
        self._measuring: LiveBytes | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose, say so, and start to measure."""
        if self._started:
            return
        self._started = True
        model: Any = pl_module.model
        # a plan's largest micro-batch
        B, T = (1, batch.most) if isinstance(batch, Local) else as_model(model).block_shape(batch)
        precision = str(trainer.precision)
        choice = choose(
            model, B, T, self.config, device=pl_module.device,
            precision=precision if precision in PRECISIONS else "32-true",
        )  # fmt: skip
        choice = trainer.strategy.broadcast(choice)
        model.use_memory(choice.plan)
        if trainer.is_global_zero:
            self.say(str(choice))
        if not self.config.estimate:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif pl_module.device.type == "cpu":
            self._measuring = LiveBytes()
            self._measuring.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what the first step took."""
        if not self.config.estimate or batch_idx > 0 or not self._started:
            return
        if pl_module.device.type == "cuda":
            peak, how = torch.cuda.max_memory_allocated(pl_module.device), "as torch's allocator counts"
        elif self._measuring is not None:
            there = sum(x.numel() * x.element_size() for x in pl_module.parameters())
            peak, how = there + self._measuring.peak, "tensors; kernels' workspace is not counted"
        else:
            return
        self._stop()
        if trainer.is_global_zero:
            self.say(f"memory of the first step, before Adam has its state: {size_text(peak)} at the peak ({how})")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step that fails is not measured to its end."""
        self._stop()

    def _stop(self) -> None:
        if self._measuring is not None:
            self._measuring.__exit__(None, None, None)
            self._measuring = None
