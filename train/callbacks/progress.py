"""What the user sees while a run trains: a live bar on a terminal, plain lines everywhere else."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from zoo.train.callbacks.limits import update_done
from zoo.train.clock import Clock
from zoo.train.metrics.metric import base_name
from zoo.train.metrics.table import metric_of
from zoo.train.optim import Limits

__all__ = ["Bar", "ProgressLine", "describe", "duration"]


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


class Shown(NamedTuple):
    """How a number of a row reads: its label, and its value as text."""

    label: str
    text: Callable[[float], str]


OF_A_RUN = {"lr": Shown("lr", lambda v: f"{v:.2e}"), "elapsed": Shown("time", duration)}
SPEED, PART = "s_per_second", "loss_"


def shown_as(name: str) -> Shown | None:
    """How a column of a row reads: of the run itself, one of several losses, a metric by its own word; None for others.

    Args:
        name: without "val_", and without a validation set.
    """
    if name in OF_A_RUN:
        return OF_A_RUN[name]
    if name.endswith(SPEED):
        return Shown(f"{name.removesuffix('_per_second')}/s", _count)
    if name.startswith(PART):
        return Shown(f"{name.removeprefix(PART).replace('_', ' ')} loss", lambda v: f"{v:.4f}")
    metric = metric_of(name)
    return None if metric is None else Shown(metric.title(), metric.text)


def describe(row: dict[str, float]) -> str:
    """A row in words: loss 2.1234  bits/byte 3.0634  lr 1.99e-03  tokens/s 10.5k  time 0:42."""
    validation = "val_loss" in row
    if validation:
        row = {name.removeprefix("val_"): value for name, value in row.items()}
    parts = []
    for base in dict.fromkeys(map(base_name, row)):
        shown = shown_as(base)
        for name, value in row.items():
            if shown is not None and base_name(name) == base:  # of all validation data, then of each set
                parts.append(f"{shown.label}{name.removeprefix(base).replace('_at_', '@')} {shown.text(value)}")
    if row.get("skipped_steps"):
        parts.append(f"skipped steps {int(row['skipped_steps'])}")
    return ("validation  " if validation else "") + "  ".join(parts)


GAP = "  "
WIDE = 80  # columns: a narrower terminal has words only
BAR_WIDTHS = 10, 24  # columns, as many as the words leave


class ProgressLine:
    """How far a run is, as one line of at most the terminal's width; a narrow one leaves out what matters least.

    Attributes:
        step: updates done.
        row: the newest training row; empty before the first.
        validated: batches done of the running validation, and of how many (infinity where that is unknown); None
            outside validation.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self.step = 0
        self.row: dict[str, float] = {}
        self.validated: tuple[int, float] | None = None
        self._first: tuple[int, float] | None = None  # number and time of this sitting's first update
        self._newest = 0.0  # time of the newest

    def advance(self, step: int) -> None:
        """Take up that `step` updates are done."""
        self.step, self._newest = step, self.clock.elapsed()
        if self._first is None:
            self._first = step, self._newest

    def remaining(self) -> float | None:
        """Seconds to the nearer limit; None while unknown.

        Steps are taken to last as long as the mean of this sitting, validation included. Its first one does not count:
        it compiles and allocates.
        """
        elapsed, estimates = self.clock.elapsed(), []
        if self.limits.max_seconds is not None:
            estimates.append(self.limits.max_seconds - elapsed)
        if self.limits.max_steps is not None and self._first is not None and self.step > self._first[0]:
            mean = (self._newest - self._first[1]) / (self.step - self._first[0])
            estimates.append((self.limits.max_steps - self.step) * mean - (elapsed - self._newest))
        return max(0.0, min(estimates)) if estimates else None

    def words(self, width: int) -> str:
        """The line without its bar, cut to what `width` columns hold."""
        shown, total = self._parts(), 0
        kept: list[str] = []
        for name in sorted(shown, key=self._rank):
            if total + len(shown[name]) > width:
                break
            total += len(shown[name]) + len(GAP)
            kept.append(name)
        return GAP.join(text for name, text in shown.items() if name in kept)

    def _parts(self) -> dict[str, str]:
        """What there is to say, in the order of the screen."""
        limits, elapsed, left = self.limits, self.clock.elapsed(), self.remaining()
        parts = {
            "percent": f"{math.floor(100 * limits.progress(self.step, elapsed)):3d}%",
            "step": f"step {self.step}" + (f"/{limits.max_steps}" if limits.max_steps is not None else ""),
        }
        if self.validated is not None:
            done, batches = self.validated
            parts["validation"] = f"validation {done}" + (f"/{batches:.0f}" if math.isfinite(batches) else "")
        parts |= {name: describe({name: value}) for name, value in self.row.items()}
        whole = f"/{duration(limits.max_seconds)}" if limits.max_seconds is not None else ""
        parts["elapsed"] = f"time {duration(elapsed)}{whole}"
        if left is not None:
            parts["left"] = f"{duration(left)} left"
        return {name: text for name, text in parts.items() if text}

    def _rank(self, name: str) -> int:
        """A narrow terminal shows the lowest; what is not named comes last, in its order."""
        first = ("validation", "step", "loss", "left", "percent", "speed", "elapsed")
        known = "speed" if name.endswith("_per_second") else name
        return first.index(known) if known in first else len(first)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A bar on a wide terminal, and the words."""
        width, (low, high) = options.max_width, BAR_WIDTHS
        if width < WIDE:
            yield Text(self.words(width), no_wrap=True, overflow="crop")
            return
        words = self.words(width - low - len(GAP))
        done = self.limits.progress(self.step, self.clock.elapsed())
        bar = ProgressBar(total=1.0, completed=done, width=min(high, width - len(words) - len(GAP)))
        yield from bar.__rich_console__(console, options)
        yield Text(GAP + words, no_wrap=True, overflow="crop")


class Bar(Callback):
    """The live line of a run on a terminal; validation rows and samples stay on the screen above it."""

    def __init__(self, limits: Limits, clock: Clock, console: Console) -> None:
        self.line = ProgressLine(limits, clock)
        self.live = Live(self.line, console=console, refresh_per_second=4)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show it: the first step may take long."""
        self.line.step = trainer.global_step
        self.live.start(refresh=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the number of updates, where this batch ended one."""
        if update_done(trainer, batch_idx):
            self.line.advance(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of this validation."""
        self.line.validated = 0, float(sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one more batch in the bar's word on validation."""
        if self.line.validated is not None:
            self.line.validated = self.line.validated[0] + 1, self.line.validated[1]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with training."""
        self.line.validated = None

    def show(self, step: int, row: dict[str, float]) -> None:
        """Take up new numbers."""
        if "val_loss" in row:
            self.live.console.print(f"step {step}  {describe(row)}", highlight=False)
        else:
            self.line.row = row
            self.line.advance(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it on the screen as it is."""
        self.live.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self.live.stop()
