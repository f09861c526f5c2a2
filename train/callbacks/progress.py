"""What the user sees while a run trains: a live bar on a terminal, plain lines everywhere else."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from zoo.train.callbacks.limits import update_done
from zoo.train.clock import Clock
from zoo.train.optim import Limits

__all__ = ["Bar", "describe", "duration"]


def duration(seconds: float) -> str:
    """0:05, 12:00 or 3:04:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _count(value: float) -> str:
    """3 significant digits with a k or M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", lambda v: f"{v:.4f}"),
    "bits_per_byte": ("bits/byte", lambda v: f"{v:.4f}"),
    "perplexity": ("perplexity", lambda v: f"{v:.2f}"),
    "accuracy": ("accuracy", lambda v: f"{v:.4f}"),
    "sequence_accuracy": ("sequences right", lambda v: f"{v:.4f}"),
    "last_accuracy": ("last right", lambda v: f"{v:.4f}"),
    "lr": ("lr", lambda v: f"{v:.2e}"),
    "tokens_per_second": ("tokens/s", _count),
    "elapsed": ("time", duration),
}


def describe(row: dict[str, float]) -> str:
    """A row in words: loss 2.1234  bits/byte 3.0634  lr 1.99e-03  tokens/s 10.5k  time 0:42."""
    validation = "val_loss" in row
    if validation:
        row = {name.removeprefix("val_"): value for name, value in row.items()}
    parts = []
    for base, (label, text) in FORMATS.items():
        for name, value in row.items():
            if name.partition("_at_")[0] == base:  # of all validation data, then of each set
                parts.append(f"{label}{name.removeprefix(base).replace('_at_', '@')} {text(value)}")
    if row.get("skipped_steps"):
        parts.append(f"skipped steps {int(row['skipped_steps'])}")
    return ("validation  " if validation else "") + "  ".join(parts)


class Bar(Callback):
    """One live line: how far, the newest numbers. Validation rows stay on the screen above it."""

    def __init__(self, limits: Limits, clock: Clock, console: Console) -> None:
        self.limits = limits
        self.clock = clock
        self.progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self.progress.add_task("", total=1.0)
        self._words = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show it."""
        self.progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move it."""
        if update_done(trainer, batch_idx):
            done = self.limits.progress(trainer.global_step, self.clock.now)
            words = f"step {trainer.global_step}  {self._words}"
            self.progress.update(self._task, completed=done, description=words)

    def show(self, step: int, row: dict[str, float]) -> None:
        """Take up new numbers."""
        if "val_loss" in row:
            self.progress.console.print(f"step {step}  {describe(row)}", highlight=False)
        else:
            self._words = describe(row)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it on the screen as it is."""
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self.progress.stop()
