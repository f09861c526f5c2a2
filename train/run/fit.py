"""From a composed config to a trained model in a run's folder, and back to it after an interruption."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from torch import Tensor, nn

from zoo.checkpoint import save
from zoo.errors import UsageError, UserError
from zoo.targets import TARGET
from zoo.train.callbacks.average import AverageWeights
from zoo.train.callbacks.checkpoints import Checkpoints
from zoo.train.callbacks.limits import StopAtLimits
from zoo.train.callbacks.log import LogMetrics
from zoo.train.callbacks.memory import FitMemory
from zoo.train.callbacks.operators import ReportOperators
from zoo.train.callbacks.plot import plot_loss
from zoo.train.callbacks.progress import Bar, describe
from zoo.train.callbacks.show import ShowSamples
from zoo.train.contracts import TakesMemoryPlan, codec_of, tokenizer_of
from zoo.train.data.core.base import DataModule
from zoo.train.memory.choose import MemoryConfig
from zoo.train.optim import Limits
from zoo.train.rng import seed_all
from zoo.train.run.build import RUN_DIR, build_model, launch_environment
from zoo.train.run.checkpoint_io import AtomicCheckpointIO
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.folder import RunFolder, is_main_process
from zoo.train.run.init_from import start_from, stored_path
from zoo.train.run.instantiate import class_of, instantiate
from zoo.train.run.interrupt import Interrupted, Interrupts
from zoo.train.run.loggers import CsvLog
from zoo.train.run.quiet import quiet_lightning
from zoo.train.run.trainer import TrainerConfig, make_trainer, training_settings
from zoo.train.strategies.fsdp import whole_weights
from zoo.train.strategies.ranks import ManyRanks
from zoo.train.tasks.task import Task

__all__ = ["resume", "run"]

DONE, FAILED, INTERRUPTED = 0, 1, 130


def run(config: Mapping[str, Any], run_dir: str | os.PathLike[str], *, callbacks: Sequence[Callback] = ()) -> int:
    """Train what a composed config asks for.

    Args:
        config: as `zoo.config.compose` gives it: model, data, task, optim, trainer, strategy, memory, logger, seed.
        run_dir: the run's folder; made, or empty.
        callbacks: further ones, called after the run's own.

    Returns:
        the exit code: 0 done, 1 the final model could not be written, 130 interrupted with a checkpoint written.

    Raises:
        UserError: what a user can cause; the run's log has it, too. A run that is refused before its first update
            leaves no folder behind.
    """
    if is_main_process():
        folder = RunFolder(Path(run_dir))
        folder.check_free()
    else:
        folder = RunFolder(Path(os.environ.get(RUN_DIR, run_dir)))
    return _train(config, folder, checkpoint=None, further=callbacks)


def resume(run_dir: str | os.PathLike[str]) -> int:
    """Go on with a run from its last checkpoint, to the same numbers as if it had never stopped; as `run`."""
    folder = RunFolder.existing(Path(run_dir))
    if folder.finished:
        folder.say(f"the run {folder.path} is finished; its model is in {folder.final}")
        return DONE
    config = folder.read_config()
    try:
        return _go_on(config, folder)
    except UsageError as error:  # the settings are those of the folder, not of the command
        raise UserError(f"the run {folder.path} cannot go on with the settings in its config.yaml: {error}") from error


def _go_on(config: Mapping[str, Any], folder: RunFolder) -> int:
    if not folder.last.is_file():
        folder.say(f"the run {folder.path} has no checkpoint yet and starts from the beginning")
        if is_main_process():
            folder.table.unlink(missing_ok=True)
        return _train(config, folder, checkpoint=None)
    return _train(config, folder, checkpoint=folder.last)


# -- one sitting ------------------------------------------------------------------------------------------------


def _train(
    config: Mapping[str, Any], folder: RunFolder, checkpoint: Path | None, further: Sequence[Callback] = ()
) -> int:
    try:
        with launch_environment(folder), quiet_lightning(), Interrupts() as interrupts:
            return _fit(config, folder, checkpoint, interrupts, further)
    except Interrupted as stop:
        if not is_main_process():
            return DONE  # Lightning kills every process when one that it started ends with an error
        return _report_interrupt(folder, stop)
    except UserError as error:
        folder.note(f"error: {error}")
        raise


def _report_interrupt(folder: RunFolder, stop: Interrupted) -> int:
    path = folder.path
    if stop.saved:
        folder.say(f"interrupted; zoo resume {path} goes on from here")
        return INTERRUPTED
    if stop.training:
        earlier = f"; zoo resume {path} goes on from the one before" if folder.last.exists() else ""
        folder.say(f"interrupted, and no checkpoint could be written{earlier}")
        return FAILED
    folder.say("interrupted before training began, nothing was lost")
    return INTERRUPTED


class Parts(NamedTuple):
    """What a config names, made."""

    options: TrainerConfig
    data: Any
    kind: type[Task]
    model: nn.Module
    limits: Limits
    task: Task


class Watch(NamedTuple):
    """What looks on while a run trains, as far as its end asks for it."""

    callbacks: list[Callback]
    table: CsvLog
    log: LogMetrics
    checkpoints: Checkpoints
    average: AverageWeights | None
    draw: Callable[[nn.Module, int | None], str | None]


def _fit(
    config: Mapping[str, Any],
    folder: RunFolder,
    checkpoint: Path | None,
    interrupts: Interrupts,
    further: Sequence[Callback],
) -> int:
    parts = _make(config)
    origin = config.get("init_from")
    if origin is not None and checkpoint is None:
        start_from(parts.model, origin)
    options, model, task = parts.options, parts.model, parts.task
    io = AtomicCheckpointIO()
    watch = _watch(config, parts, folder, interrupts, io)
    trainer = make_trainer(
        options,
        config.get("strategy"),
        plugins=[io],
        callbacks=[*watch.callbacks, *further],
        logger=[watch.table, *_loggers(config, folder)],
        default_root_dir=folder.path,
        **training_settings(options, parts.limits.max_steps),
    )
    if not folder.config.is_file():
        decided = {field: vars(model.config)[field] for field in parts.kind.fields(parts.data)}
        kept = {"run_dir": str(folder.path), "init_from": None if origin is None else stored_path(origin)}
        folder.create({**config, "model": {**config["model"], **decided}, **kept})
    if checkpoint is None:
        parameters = sum(p.numel() for p in model.parameters())
        start = "" if origin is None else f", from the weights of {origin}"
        what = f"{config['model']['name']} ({parameters:,} parameters), {parts.kind.__name__}"
        folder.say(f"training {what}{start}, in {folder.path}")
    else:
        folder.say(f"going on with {folder.path}")
    _run(trainer, task, parts.data, checkpoint, folder)
    keeps = not options.fast_dev_run
    fault = task.fault(watch.log.final.get("val_loss", 0.0))
    weights = whole_weights(model) if keeps else None
    average = watch.average.whole() if keeps and watch.average is not None else None
    if not trainer.is_global_zero:
        return DONE
    if fault is not None:
        raise UserError(
            f"the run in {folder.path} ended with a model that is of no use, {fault} being not finite; lower optim.lr "
            "and start a new run (the checkpoints are kept)"
        )
    if not keeps:
        return DONE
    if weights is not None:
        model = build_model(config["model"], parts.data, parts.kind)
        model.load_state_dict(weights)
    averaged = None if average is None else _averaged(config, parts, model, average)
    return _finish(folder, model, averaged, parts.data, watch.draw, watch.log.final, watch.checkpoints.failed)


def _make(config: Mapping[str, Any]) -> Parts:
    """Data first, then the model, whose vocabulary is theirs, then the task. Bad data are refused before all else."""
    seed_all(config["seed"])
    options: TrainerConfig = instantiate("trainer", config["trainer"])
    data = instantiate("data", config["data"], seed=config["seed"])
    data.prepare_data()
    data.setup("fit")
    kind = class_of("task", config["task"])
    model = build_model(config["model"], data, kind)
    per_epoch = None
    if options.max_epochs is not None:
        per_epoch = _batches_per_epoch(options, data, config.get("strategy"))
    limits = options.limits(per_epoch)
    optim = instantiate("optim", config["optim"])
    task = instantiate("task", config["task"], model, optim, limits, data)
    return Parts(options, data, kind, model, limits, task)


def _watch(
    config: Mapping[str, Any], parts: Parts, folder: RunFolder, interrupts: Interrupts, io: AtomicCheckpointIO
) -> Watch:
    """The run's callbacks, in the order in which Lightning calls them."""
    options, data, task, limits = parts.options, parts.data, parts.task, parts.limits
    keeps = not options.fast_dev_run
    table = CsvLog(folder.table, task.columns)
    checkpoints = Checkpoints(folder.checkpoints, options.checkpoint_every, interrupts, io, folder.say)
    decay = config.get("ema")
    average = None if decay is None else AverageWeights(decay)
    callbacks: list[Callback] = [StopAtLimits(limits, task.clock, interrupts)]
    if average is not None:
        callbacks.append(average)
    show = partial(_show_line, folder, limits)
    on_terminal = sys.stdout.isatty() and is_main_process()
    if on_terminal:
        bar = Bar(limits, task.clock, Console())
        callbacks.append(bar)
        show = partial(_show_bar, folder, bar)
    log = LogMetrics(options.log_every, table if keeps else None, show)
    callbacks.append(log)
    draw = partial(_show_sample, task, data, folder)
    if keeps:
        callbacks.append(ShowSamples(options.sample_every, draw, folder.say))
    if keeps:
        callbacks.append(checkpoints)
    callbacks.append(ReportOperators(folder.note_operators))
    callbacks += _memory(config.get("memory"), parts.model, folder)
    return Watch(callbacks, table, log, checkpoints, average, draw)


def _run(trainer: Trainer, task: Task, data: Any, checkpoint: Path | None, folder: RunFolder) -> None:
    """Train; a run that is refused before its first update leaves no folder."""
    try:
        trainer.fit(task, datamodule=EndlessData(data, task), ckpt_path=checkpoint)
    except OSError as error:
        raise UserError(f"the run in {folder.path} could not go on: {error.strerror or error}") from error
    except UserError:
        if trainer.global_step == 0:
            folder.discard()
        raise


def _averaged(config: Mapping[str, Any], parts: Parts, model: nn.Module, average: Mapping[str, Tensor]) -> nn.Module:
    """A further model with the average in place of the parameters."""
    averaged = build_model(config["model"], parts.data, parts.kind)
    averaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            parameter.copy_(average[name])
    return averaged


def _finish(
    folder: RunFolder,
    model: nn.Module,
    averaged: nn.Module | None,
    data: LightningDataModule,
    draw: Callable[[nn.Module, int | None], str | None],
    final: Mapping[str, float],
    failed: bool,
) -> int:
    """The final model, which makes the run a finished one, and before it its average; the plot, the report."""
    tokenizer, codec = tokenizer_of(data), codec_of(data)
    try:
        if averaged is not None:
            save(averaged, folder.average, tokenizer=tokenizer, codec=codec)
        save(model, folder.final, tokenizer=tokenizer, codec=codec)
    except (OSError, UserError) as error:
        kept = f"; {folder.last} holds the run" if folder.last.exists() and not failed else ""
        raise UserError(f"the final model could not be written to {folder.final}: {error}{kept}") from error
    try:
        plot_loss(folder)
    except UserError as error:  # an extra is missing; the run is as good without
        folder.say(str(error))
    except OSError as error:
        folder.say(f"warning: {folder.plot} could not be drawn ({error.strerror or error})")
    if (sample := draw(model, None)) is not None:
        folder.say(sample)
    if final:
        folder.say(f"final {describe(dict(final))}")
    folder.say(f"run: {folder.path}")
    return FAILED if failed else DONE


def _show_line(folder: RunFolder, limits: Limits, step: int, row: dict[str, float]) -> None:
    of = f"/{limits.max_steps}" if limits.max_steps else ""
    folder.say(f"step {step}{of}  {describe(row)}")


def _show_sample(task: Task, data: Any, folder: RunFolder, model: nn.Module, step: int | None) -> str | None:
    """What the task shows; a picture that cannot be drawn ends no run."""
    try:
        return task.show(model, data, folder.path, step)
    except UserError as error:  # an extra is missing
        return str(error)
    except OSError as error:
        return f"warning: nothing could be shown ({error.strerror or error})"


def _show_bar(folder: RunFolder, bar: Bar, step: int, row: dict[str, float]) -> None:
    folder.note(f"step {step}  {describe(row)}")
    bar.show(step, row)


# -- parts ------------------------------------------------------------------------------------------------------


def _memory(section: Any, model: nn.Module, folder: RunFolder) -> list[Callback]:
    """What chooses how activations are kept, where anything is asked for; runs of before had no such settings."""
    options: MemoryConfig = instantiate("memory", section or {})
    if not options.changes:
        return []
    if not isinstance(model, TakesMemoryPlan):
        raise UserError(
            f"memory settings need a model with members memory and use_memory, and {type(model).__name__} has not "
            "both; memory=none"
        )
    return [FitMemory(options, folder.say)]


def _loggers(config: Mapping[str, Any], folder: RunFolder) -> list[Logger]:
    """The chosen logger beside metrics.csv, writing into the run's folder unless told otherwise."""
    section = config.get("logger")
    if not isinstance(section, Mapping) or TARGET not in section:
        return []
    if section.get("save_dir") in (None, "."):
        section = {**section, "save_dir": str(folder.path)}
    return [instantiate("logger", section)]


def _batches_per_epoch(options: TrainerConfig, data: Any, strategy: Any) -> int:
    """Batches of an epoch on each rank; a throw-away trainer knows how many ranks there will be."""
    data.setup("fit")
    probe = make_trainer(options, strategy)
    # ranks with data of their own: fewer where several share a sequence
    ranks = probe.strategy.dp_size if isinstance(probe.strategy, ManyRanks) else probe.world_size
    return data.sources[0].steps(ranks) if isinstance(data, DataModule) else len(data.train_dataloader()) // ranks
