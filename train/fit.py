"""From a composed config to a trained model in a run's folder, and back to it after an interruption."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

from zoo import tokenizers
from zoo.checkpoint import load, locate, run_of, save
from zoo.config import compose
from zoo.decoding import generate
from zoo.errors import UsageError, UserError, remedy
from zoo.registry import create_model, model_info, resolve
from zoo.train.callbacks.checkpoints import Checkpoints
from zoo.train.callbacks.limits import StopAtLimits
from zoo.train.callbacks.log import LogMetrics
from zoo.train.callbacks.memory import FitMemory
from zoo.train.callbacks.plot import plot_loss
from zoo.train.callbacks.progress import Bar, describe
from zoo.train.callbacks.sample import SampleText, sample
from zoo.train.checkpoint_io import AtomicCheckpointIO
from zoo.train.data.base import DataModule
from zoo.train.interrupt import Interrupted, Interrupts
from zoo.train.loggers import CsvLog
from zoo.train.memory.choose import MemoryConfig
from zoo.train.optim import Limits
from zoo.train.quiet import quiet_lightning
from zoo.train.rng import seed_all
from zoo.train.run_folder import RunFolder, is_main_process
from zoo.train.strategies.fsdp import whole_weights
from zoo.train.stream import EndlessData
from zoo.train.tasks.task import Task
from zoo.train.trainer import TrainerConfig

__all__ = ["evaluate", "resume", "run"]

DONE, FAILED, INTERRUPTED = 0, 1, 130
RUN_DIR = "ZOO_RUN_DIR"  # tells the processes that Lightning starts for further devices which folder is the run's
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", RUN_DIR)  # set for those processes


def run(config: Mapping[str, Any], run_dir: str | os.PathLike[str], *, callbacks: Sequence[Callback] = ()) -> int:
    """Train what a composed config asks for.

    Args:
        config: as `zoo.config.compose` gives it: model, data, task, optim, trainer, strategy, memory, logger, seed.
        run_dir: the run's folder; made, or empty.
        callbacks: further ones, called after the run's own.

    Returns:
        the exit code: 0 done, 1 the final model could not be written, 130 interrupted with a checkpoint written.

    Raises:
        UserError: what a user can cause; the run's log has it, too.
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
    if not folder.last.is_file():
        folder.say(f"the run {folder.path} has no checkpoint yet and starts from the beginning")
        if is_main_process():
            folder.table.unlink(missing_ok=True)
        return _train(folder.read_config(), folder, checkpoint=None)
    return _train(folder.read_config(), folder, checkpoint=folder.last)


def evaluate(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measure a run or a checkpoint on the held-out part of its own data or of others.

    Args:
        path: the folder of a run, or a checkpoint as `zoo.load` takes it.
            Text is cut into tokens as in its training, unless `data.tokenizer` says otherwise.
        overrides: `data=...` and `data.KEY=VALUE`; `trainer.KEY=VALUE` for batch limits and precision. One device
            measures, however many trained, unless `strategy=...` and `trainer.devices=N` say otherwise; then every
            process must call this function, as those do that Lightning starts.

    Returns:
        the metrics, by name: loss and what the data can be judged by; the same on all ranks.
    """
    found = locate(path)
    model = load(found)
    run_folder = run_of(found)
    known = RunFolder.existing(run_folder).read_config() if run_folder is not None else None
    config = _evaluation_config(known, _task_of(model, overrides) if known is None else overrides)
    config["data"] = _with_own_tokenizer(config["data"], found, None if known is None else known["data"], overrides)
    seed_all(config["seed"])
    data = _build_data(config)
    kind = resolve(config["task"]["_target_"])
    _check_fields(model, data, kind)
    trainer_config = _trainer_config(config["trainer"])
    optim = resolve(config["optim"]["_target_"])(**_settings(config["optim"]))
    task = kind(model, optim, Limits(), data, **_settings(config["task"]))
    with _launch_environment(), quiet_lightning():
        with _readable_refusals():
            trainer = Trainer(
                accelerator=trainer_config.accelerator,
                strategy=_strategy(config["strategy"]),
                devices=trainer_config.devices,
                num_nodes=trainer_config.num_nodes,
                precision=_precision(trainer_config),  # type: ignore[arg-type]
                limit_val_batches=trainer_config.limit_val_batches,
                inference_mode=False,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                plugins=[*_environment()],
            )
        trainer.validate(task, datamodule=data, verbose=False)
    return {name.removeprefix("val_"): float(value) for name, value in trainer.callback_metrics.items()}


# -- one sitting ------------------------------------------------------------------------------------------------


def _train(
    config: Mapping[str, Any], folder: RunFolder, checkpoint: Path | None, further: Sequence[Callback] = ()
) -> int:
    try:
        with _launch_environment(folder), quiet_lightning(), Interrupts() as interrupts:
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


def _fit(
    config: Mapping[str, Any],
    folder: RunFolder,
    checkpoint: Path | None,
    interrupts: Interrupts,
    further: Sequence[Callback],
) -> int:
    seed_all(config["seed"])
    options = _trainer_config(config["trainer"])
    data = _build_data(config)
    data.prepare_data()
    data.setup("fit")  # bad data are refused before there is a folder for the run
    kind = resolve(config["task"]["_target_"])
    model = _build_model(config["model"], data, kind)
    per_epoch = None
    if options.max_epochs is not None:
        per_epoch = _batches_per_epoch(options, data, _strategy(config.get("strategy")))
    limits = options.limits(per_epoch)
    optim = resolve(config["optim"]["_target_"])(**_settings(config["optim"]))
    task = kind(model, optim, limits, data, **_settings(config["task"]))
    assert isinstance(task, Task)

    keeps = not options.fast_dev_run
    table = CsvLog(folder.table, task.columns)
    io = AtomicCheckpointIO()
    checkpoints = Checkpoints(folder.checkpoints, options.checkpoint_every, interrupts, io, folder.say)
    callbacks: list[Callback] = [StopAtLimits(limits, task.clock, interrupts)]
    show = partial(_show_line, folder, limits)
    on_terminal = sys.stdout.isatty() and is_main_process()
    if on_terminal:
        bar = Bar(limits, task.clock, Console())
        callbacks.append(bar)
        show = partial(_show_bar, folder, bar)
    log = LogMetrics(options.log_every, table if keeps else None, show)
    callbacks.append(log)
    writes = task.continues_text and getattr(data, "tokenizer", None) is not None
    draw = partial(sample, generate, tokenizer=data.tokenizer) if writes else None
    if draw is not None:
        callbacks.append(SampleText(options.sample_every, draw, folder.say))
    if keeps:
        callbacks.append(checkpoints)
    callbacks += _memory(config.get("memory"), model, folder)
    callbacks += further
    loggers = [table, *_loggers(config, folder)]
    with _readable_refusals():
        trainer = _build_trainer(config, options, limits, callbacks, loggers, io, folder)

    if not folder.config.is_file():
        vocabulary = {"vocab_size": model.config.vocab_size}  # type: ignore[union-attr]
        folder.create({**config, "model": {**config["model"], **vocabulary}, "run_dir": str(folder.path)})
    if checkpoint is None:
        parameters = sum(p.numel() for p in model.parameters())
        what = config["task"]["_target_"].rpartition(".")[2]
        folder.say(f"training {config['model']['name']} ({parameters:,} parameters), {what}, in {folder.path}")
    else:
        folder.say(f"going on with {folder.path}")
    try:
        trainer.fit(task, datamodule=EndlessData(data), ckpt_path=checkpoint)
    except OSError as error:
        raise UserError(f"the run in {folder.path} could not go on: {error.strerror or error}") from error
    weights = whole_weights(model) if keeps else None
    if not trainer.is_global_zero or not keeps:
        return DONE
    if weights is not None:
        model = _build_model(config["model"], data, kind)
        model.load_state_dict(weights)
    return _finish(folder, model, data, draw, log.final, checkpoints.failed)


def _finish(
    folder: RunFolder, model: nn.Module, data: LightningDataModule, draw: Any, final: Mapping[str, float], failed: bool
) -> int:
    """The final model, the plot, the report."""
    try:
        save(model, folder.final, tokenizer=getattr(data, "tokenizer", None))
    except (OSError, UserError) as error:
        kept = f"; {folder.last} holds the run" if folder.last.exists() and not failed else ""
        raise UserError(f"the final model could not be written to {folder.final}: {error}{kept}") from error
    try:
        plot_loss(folder.table, folder.plot)
    except OSError as error:
        folder.say(f"warning: {folder.plot} could not be drawn ({error.strerror or error})")
    if draw is not None:
        folder.say(f"sample:\n{draw(model)}")
    if final:
        folder.say(f"final {describe(dict(final))}")
    folder.say(f"run: {folder.path}")
    return FAILED if failed else DONE


def _show_line(folder: RunFolder, limits: Limits, step: int, row: dict[str, float]) -> None:
    of = f"/{limits.max_steps}" if limits.max_steps else ""
    folder.say(f"step {step}{of}  {describe(row)}")


def _show_bar(folder: RunFolder, bar: Bar, step: int, row: dict[str, float]) -> None:
    folder.note(f"step {step}  {describe(row)}")
    bar.show(step, row)


# -- parts ------------------------------------------------------------------------------------------------------


def _build_data(config: Mapping[str, Any]) -> Any:
    owner = resolve(config["data"]["_target_"])
    settings = _settings(config["data"])
    if "seed" in inspect.signature(owner).parameters:
        settings.setdefault("seed", config["seed"])
    return owner(**settings)


def _build_model(section: Mapping[str, Any], data: Any, task: type[Task]) -> nn.Module:
    """The model, with the vocabulary (and the classes) of the data unless the user wants more."""
    fields = {key: value for key, value in section.items() if key not in ("name", "size")}
    for field, value in task.fields(data).items():
        if field not in model_info(section["name"]).fields:
            raise UserError(
                f"{task.__name__} needs a model with the field {field}, and {section['name']} has none; "
                "zoo list --tag encoder shows models that have it"
            )
        if fields.get(field) is None:
            fields[field] = value
    model = create_model(section["name"], section["size"], **fields)
    _check_fields(model, data, task)
    return model


def _check_fields(model: nn.Module, data: Any, task: type[Task]) -> None:
    """Refuse a model that has no room for the tokens or the classes of the data."""
    for field, least in task.fields(data).items():
        size = getattr(model.config, field, None)
        if size is None or size < least:
            what = {"vocab_size": "tokens", "n_classes": "classes"}.get(field, field)
            raise UserError(
                f"the model must hold what the data have: model.{field} is {size} and the data have {least} {what} for "
                f"{task.__name__}; leave model.{field} out or choose other data"
            )


def _memory(section: Any, model: nn.Module, folder: RunFolder) -> list[Callback]:
    """What chooses how activations are kept, where anything is asked for; runs of before had no such settings."""
    options = MemoryConfig(**_settings(section or {}))
    if not options.changes:
        return []
    if not hasattr(model, "use_memory"):
        raise UserError(
            f"memory settings need a model of zoo's blocks, and {type(model).__name__} is none; memory=none"
        )
    return [FitMemory(options, folder.say)]


def _build_trainer(
    config: Mapping[str, Any],
    options: TrainerConfig,
    limits: Limits,
    callbacks: list[Callback],
    loggers: list[Logger],
    io: AtomicCheckpointIO,
    folder: RunFolder,
) -> Trainer:
    """Lightning's Trainer: one endless epoch, our callbacks, our limits."""
    return Trainer(
        accelerator=options.accelerator,
        strategy=_strategy(config.get("strategy")),
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=_precision(options),  # type: ignore[arg-type]
        fast_dev_run=options.fast_dev_run,
        max_epochs=-1,
        max_steps=limits.max_steps or -1,
        limit_val_batches=options.limit_val_batches,
        val_check_interval=options.val_every * options.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=options.gradient_clip_val,
        gradient_clip_algorithm=options.gradient_clip_algorithm,
        deterministic=options.deterministic,
        benchmark=options.benchmark,
        inference_mode=False,  # tables that a model makes on first use must be usable in training
        use_distributed_sampler=False,  # the data module knows its ranks
        profiler=options.profiler,
        detect_anomaly=options.detect_anomaly,
        sync_batchnorm=options.sync_batchnorm,
        callbacks=callbacks,
        logger=loggers,
        plugins=[io, *_environment()],
        enable_checkpointing=not options.fast_dev_run,
        enable_progress_bar=False,
        enable_model_summary=options.enable_model_summary,
        default_root_dir=folder.path,
    )


@contextmanager
def _readable_refusals() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer settings that Lightning refuses: {str(error).strip().splitlines()[0]}") from error


def _environment() -> list[ClusterEnvironment]:
    """SLURM without Lightning's requeueing: it writes checkpoints of its own, which it prefers to ours ever after."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []  # what Lightning finds on its own
    return [SLURMEnvironment(auto_requeue=False)]


def _trainer_config(section: Mapping[str, Any]) -> TrainerConfig:
    owner = resolve(section["_target_"]) if "_target_" in section else TrainerConfig
    options = owner(**_settings(section))
    assert isinstance(options, TrainerConfig)
    return options


def _precision(options: TrainerConfig) -> str:
    if options.precision is not None:
        return options.precision
    on_cuda = torch.cuda.is_available() and options.accelerator in ("auto", "gpu", "cuda")
    return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"


def _strategy(section: Any) -> Any:
    if isinstance(section, Mapping):
        return resolve(section["_target_"])(**_settings(section)) if "_target_" in section else "auto"
    return section or "auto"


def _loggers(config: Mapping[str, Any], folder: RunFolder) -> list[Logger]:
    """The chosen logger beside metrics.csv, writing into the run's folder unless told otherwise."""
    section = config.get("logger")
    if not isinstance(section, Mapping) or "_target_" not in section:
        return []
    settings = _settings(section)
    if settings.get("save_dir") in (None, "."):
        settings["save_dir"] = str(folder.path)
    return [resolve(section["_target_"])(**settings)]


def _settings(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "_target_"}


def _batches_per_epoch(options: TrainerConfig, data: Any, strategy: Any) -> int:
    """Batches of an epoch on each rank; a throw-away trainer knows how many ranks there will be."""
    data.setup("fit")
    probe = Trainer(
        accelerator=options.accelerator,
        strategy=strategy,
        devices=options.devices,
        num_nodes=options.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # ranks with data of their own: fewer where several share a sequence
    ranks = int(getattr(probe.strategy, "dp_size", probe.world_size))
    return data.sources[0].steps(ranks) if isinstance(data, DataModule) else len(data.train_dataloader()) // ranks


def _evaluation_config(known: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The run's own config with these overrides, or the defaults with them; on one device unless they say otherwise."""
    config = _overridden(known, overrides)
    for name in ("devices", "num_nodes"):
        if not any(override.startswith(f"trainer.{name}=") for override in overrides):
            config["trainer"] = {**config["trainer"], name: 1}
    return config


def _overridden(known: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    if known is None:
        return compose(list(overrides))
    if any(override.startswith("data=") for override in overrides):
        composed = compose(list(overrides))
        return {**known, **{group: composed[group] for group in ("data", "trainer", "strategy")}}
    ranks = [override for override in overrides if override.startswith(("strategy=", "strategy."))]
    config = {**known, "data": dict(known["data"]), "trainer": dict(known["trainer"])}
    config["strategy"] = compose(ranks)["strategy"]  # not the run's: it may have had other devices
    for override in overrides:
        key, _, text = override.partition("=")
        group, _, name = key.partition(".")
        if override in ranks:
            continue
        if group not in ("data", "trainer") or name not in config[group]:
            known_keys = [f"{g}.{k}" for g in ("data", "trainer") for k in config[g]]
            raise UsageError(
                f"no setting {key!r} for an evaluation{remedy(key, known_keys, 'data=NAME takes other data')}"
            )
        config[group][name] = yaml.safe_load(text)
    return config


def _task_of(model: nn.Module, overrides: Sequence[str]) -> list[str]:
    """The overrides, with the task that a model without a run was made for."""
    if any(override.startswith("task=") for override in overrides):
        return list(overrides)
    classes = getattr(model.config, "n_classes", None) is not None
    return [f"task={'classification' if classes else model_info(str(model.name)).task}", *overrides]


def _with_own_tokenizer(
    data: dict[str, Any], found: Path, trained_on: Mapping[str, Any] | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The settings of text to measure, with the tokenizer that the model in `found` was trained with."""
    if "tokenizer" not in data or any(override.startswith("data.tokenizer=") for override in overrides):
        return data
    if any((found / name).is_file() for name in tokenizers.FILES):
        return {**data, "tokenizer": str(found), "vocab_size": None}
    own = (trained_on or {}).get("tokenizer")
    if own is None or not any(override.startswith("data=") for override in overrides):
        return data
    if own == "sentencepiece":
        raise UserError(
            f"other data need the run's own tokenizer, which {found} does not hold; zoo resume finishes the run and "
            "saves it"
        )
    return {**data, "tokenizer": own, "vocab_size": None}


@contextmanager
def _launch_environment(folder: RunFolder | None = None) -> Iterator[None]:
    """Lightning starts further processes with the same command; they must find a run's folder, not make one.

    What it sets for them is taken back, so that the next run of this process starts like the first.
    """
    before = {name: os.environ.get(name) for name in LAUNCH}
    if folder is not None:
        os.environ[RUN_DIR] = str(folder.path.resolve())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
