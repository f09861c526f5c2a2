"""The trainer's options, a handful of our own and Lightning's by their own names; and the Trainer made of them."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from zoo.errors import UsageError, UserError
from zoo.ranges import Range, check_fields
from zoo.train.optim import Limits
from zoo.train.run.instantiate import strategy_of

__all__ = ["TrainerConfig", "make_trainer", "training_settings"]

DEFAULT_STEPS = 1000
DEFAULT_SECONDS = 240.0
PROCESSES_A_CORE = 8  # tests and rehearsals start more processes than there are cores; nobody means dozens for each


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, where and how often.

    A run is counted in updates ("steps"), whatever the batches per update and the epochs of the data. The second
    block holds arguments of `lightning.Trainer`, with their meaning there. Those that would make an epoch something
    else than one pass over the data (limit_train_batches, overfit_batches, ...) have no place here.

    Args:
        max_steps: updates; the schedule ends there.
        max_time: "DD:HH:MM:SS", "HH:MM:SS" or "MM:SS" of training, over all sittings; the schedule ends by then, so
            that a run limited by time is only as repeatable as the machine's speed. With none of max_steps, max_time
            and max_epochs: 1000 steps or 4 minutes, whichever comes first.
        max_epochs: passes over the data; turned into steps.
        log_every: steps between two rows of metrics; before the first of them, steps 1, 2, 3, 4, 6, 8, 12,
            ... have rows.
        val_every: steps between two validations; one more follows the last step.
        checkpoint_every: steps between two checkpoints; every validation writes one, too. 0: only those.
        sample_every: steps between two text samples; 0: only the one at the end.
    """

    max_steps: Annotated[int | None, Range(1)] = None
    max_time: str | None = None
    max_epochs: Annotated[int | None, Range(1)] = None
    log_every: Annotated[int, Range(1)] = 20
    val_every: Annotated[int, Range(1)] = 200
    checkpoint_every: Annotated[int, Range(0)] = 200
    sample_every: Annotated[int, Range(0)] = 500

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: Annotated[int, Range(1)] = 1
    precision: str | None = None  # None: bf16-mixed on CUDA, 32-true elsewhere
    fast_dev_run: Annotated[int | bool, Range(0)] = False
    limit_val_batches: Annotated[int | float, Range(0)] = 1.0
    accumulate_grad_batches: Annotated[int, Range(1)] = 1
    gradient_clip_val: Annotated[float | None, Range(0)] = 1.0
    gradient_clip_algorithm: str = "norm"
    deterministic: bool = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    profiler: str | None = None
    enable_model_summary: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "trainer.")
        self._check_processes()
        most = 1.0 if isinstance(self.limit_val_batches, float) else math.inf
        if self.limit_val_batches > most:
            raise UsageError(
                "trainer.limit_val_batches must be a number of batches, or a part of them in [0.0, 1.0]; got "
                f"{self.limit_val_batches}"
            )
        if self.fast_dev_run < 0:
            raise UsageError(f"trainer.fast_dev_run must be true, false or a number of steps; got {self.fast_dev_run}")
        if self.precision is not None and str(self.precision).startswith("16"):
            raise UserError(
                f"trainer.precision={self.precision} is not supported, since float16 needs its loss scaled and our "
                "gradients already are: use bf16-mixed"
            )
        if self.gradient_clip_algorithm != "norm":
            raise UserError(
                f"trainer.gradient_clip_algorithm must be norm, got {self.gradient_clip_algorithm}: gradients are "
                "clipped by their global norm, see trainer.gradient_clip_val"
            )
        if self.max_time is not None:
            parse_time(self.max_time)

    def _check_processes(self) -> None:
        """Refuse more processes on a CPU than it can hold: Lightning would start them all."""
        on_cpu = self.accelerator == "cpu" or (self.accelerator == "auto" and not torch.accelerator.is_available())
        count = int(str(self.devices)) if str(self.devices).isdecimal() else 0
        cores = os.cpu_count() or 1
        if on_cpu and count > PROCESSES_A_CORE * cores:
            raise UsageError(
                f"trainer.devices counts processes on a CPU and may be at most {PROCESSES_A_CORE} for each core, "
                f"{PROCESSES_A_CORE * cores} here; got {count}"
            )

    def limits(self, batches_per_epoch: int | None) -> Limits:
        """The limits in steps and seconds; `batches_per_epoch` is only needed with `max_epochs`."""
        if self.fast_dev_run:
            return Limits(max_steps=int(self.fast_dev_run))
        if self.max_steps is None and self.max_time is None and self.max_epochs is None:
            return Limits(max_steps=DEFAULT_STEPS, max_seconds=DEFAULT_SECONDS)
        steps = self.max_steps
        if self.max_epochs is not None:
            if batches_per_epoch is None:
                raise UserError("trainer.max_epochs needs data of a known length, these stream: use trainer.max_steps")
            by_epochs = max(1, self.max_epochs * batches_per_epoch // self.accumulate_grad_batches)
            steps = by_epochs if steps is None else min(steps, by_epochs)
        seconds = parse_time(self.max_time).total_seconds() if self.max_time is not None else None
        return Limits(max_steps=steps, max_seconds=seconds)


def parse_time(text: str) -> timedelta:
    """ "DD:HH:MM:SS" with leading parts left out."""
    parts = str(text).split(":")
    if not 2 <= len(parts) <= 4 or not all(part.isdigit() for part in parts):
        raise UserError(f"trainer.max_time must read like 00:01:30:00 (days, hours, minutes, seconds), got {text!r}")
    days, hours, minutes, seconds = [0] * (4 - len(parts)) + [int(part) for part in parts]
    duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if not duration:
        raise UserError(f"trainer.max_time must be longer than zero, got {text!r}")
    return duration


def make_trainer(options: TrainerConfig, strategy: Any, *, plugins: Sequence[Any] = (), **more: Any) -> Trainer:
    """Lightning's Trainer with these options; nothing is written, printed or logged unless `more` says so.

    Args:
        options: where and in which precision it runs.
        strategy: the config's section, or a name.
        plugins: further ones, beside the cluster's environment.
        more: further arguments of `lightning.Trainer`.

    Raises:
        UsageError: settings that Lightning refuses.
    """
    settings: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
        "precision": precision_of(options),
        "limit_val_batches": options.limit_val_batches,
        "inference_mode": False,  # tables that a model makes on first use must be usable in training
        "use_distributed_sampler": False,  # the data module knows its ranks
        "plugins": [*plugins, *cluster_environment()],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with readable_refusals():
        return Trainer(strategy=strategy_of(strategy), **{**settings, **more})


def training_settings(options: TrainerConfig, max_steps: int | None) -> dict[str, Any]:
    """What `make_trainer` takes besides for a run: one endless epoch, validated by updates."""
    return {
        "fast_dev_run": options.fast_dev_run,
        "max_epochs": -1,
        "max_steps": max_steps or -1,
        "val_check_interval": options.val_every * options.accumulate_grad_batches,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "accumulate_grad_batches": options.accumulate_grad_batches,
        "gradient_clip_val": options.gradient_clip_val,
        "gradient_clip_algorithm": options.gradient_clip_algorithm,
        "deterministic": options.deterministic,
        "benchmark": options.benchmark,
        "profiler": options.profiler,
        "detect_anomaly": options.detect_anomaly,
        "sync_batchnorm": options.sync_batchnorm,
        "enable_checkpointing": not options.fast_dev_run,
        "enable_model_summary": options.enable_model_summary,
    }


def precision_of(options: TrainerConfig) -> str:
    """As asked for; else bfloat16 where a CUDA device has it, and float32."""
    if options.precision is not None:
        return options.precision
    on_cuda = torch.cuda.is_available() and options.accelerator in ("auto", "gpu", "cuda")
    return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"


def cluster_environment() -> list[ClusterEnvironment]:
    """SLURM without Lightning's requeueing: it writes checkpoints of its own, which it prefers to ours ever after."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []  # what Lightning finds on its own
    return [SLURMEnvironment(auto_requeue=False)]


@contextmanager
def readable_refusals() -> Iterator[None]:
    """Around the making of a Trainer: what Lightning refuses becomes a UsageError of one line."""
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UsageError(f"trainer settings that Lightning refuses: {str(error).strip().splitlines()[0]}") from error
