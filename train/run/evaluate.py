"""A trained model measured on data: its own held-out part, or others."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zoo import tokenizers
from zoo.checkpoint import load, locate, run_of
from zoo.codecs.codec import DESCRIPTION
from zoo.config import check, compose, parse_fields
from zoo.errors import UsageError, UserError, remedy
from zoo.registry import model_info
from zoo.targets import TARGET
from zoo.train.optim import Limits
from zoo.train.rng import seed_all
from zoo.train.run.build import check_fields, launch_environment
from zoo.train.run.folder import RunFolder
from zoo.train.run.instantiate import class_of, instantiate
from zoo.train.run.quiet import quiet_lightning
from zoo.train.run.trainer import TrainerConfig, make_trainer
from zoo.train.tasks.task import Task

__all__ = ["evaluate"]


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

    Raises:
        UserError: the loss is not finite, so that no metric says anything.
    """
    source = locate(path)
    model = load(source)
    run_folder = run_of(source)
    known = RunFolder.existing(run_folder).read_config() if run_folder is not None else None
    config = _evaluation_config(known, _task_of(model, overrides) if known is None else overrides)
    config["data"] = _with_own_tokenizer(config["data"], source, None if known is None else known["data"], overrides)
    config["data"] = _with_own_codec(config["data"], source, overrides)
    seed_all(config["seed"])
    data = instantiate("data", config["data"], seed=config["seed"])
    kind = class_of("task", config["task"])
    check_fields(model, data, kind)
    options: TrainerConfig = instantiate("trainer", config["trainer"])
    optim = instantiate("optim", config["optim"])
    task: Task = instantiate("task", config["task"], model, optim, Limits(), data)
    with launch_environment(), quiet_lightning():
        trainer = make_trainer(options, config["strategy"])
        trainer.validate(task, datamodule=data, verbose=False)
    measured = {name.removeprefix("val_"): float(value) for name, value in trainer.callback_metrics.items()}
    if not math.isfinite(measured.get("loss", 0.0)):
        raise UserError(
            f"the loss of the model in {source} is {measured['loss']}, so its weights are broken or its training "
            "diverged; take an earlier checkpoint, or train again with a lower optim.lr"
        )
    return measured


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
    overrides = [word for word in overrides if not _is_own_task(word, known)]
    if any(override.startswith("data=") for override in overrides):
        for override in overrides:
            key = override.partition("=")[0]
            if key.partition(".")[0] not in ("data", "trainer", "strategy", "seed"):
                raise UsageError(
                    f"no setting {key!r} for an evaluation; data, trainer and strategy can be chosen, and the rest is "
                    "the run's"
                )
        composed = compose(overrides)
        return {**known, **{group: composed[group] for group in ("data", "trainer", "strategy")}}
    ranks = [override for override in overrides if override.startswith(("strategy=", "strategy."))]
    config = {**known, "data": dict(known["data"]), "trainer": dict(known["trainer"])}
    config["strategy"] = compose(ranks)["strategy"]  # not the run's: it may have had other devices
    typed = {}
    for override in overrides:
        key, _, text = override.partition("=")
        group, _, name = key.partition(".")
        if override in ranks:
            continue
        if group not in ("data", "trainer") or name not in config[group] or name == TARGET:
            known_keys = [f"{g}.{k}" for g in ("data", "trainer") for k in config[g] if k != TARGET]
            raise UsageError(
                f"no setting {key!r} for an evaluation{remedy(key, known_keys, 'data=NAME takes other data')}"
            )
        config[group][name] = parse_fields([override])[key]
        typed[key] = text
    return check(config, typed)


def _is_own_task(override: str, known: Mapping[str, Any]) -> bool:
    """Whether an override chooses the task that the run was trained for.

    Raises:
        UsageError: it chooses another one, for which this run's model was not made.
    """
    if not override.startswith("task="):
        return False
    own, asked = (class_of("task", section) for section in (known["task"], compose([override])["task"]))
    if own is not asked:
        raise UsageError(
            f"a run is measured by the task that it was trained for, {own.__name__}, and {override} asks for another; "
            f"choose data for {own.__name__}, or train a model with {override}"
        )
    return True


def _task_of(model: nn.Module, overrides: Sequence[str]) -> list[str]:
    """The overrides, with the task and the data that a model without a run was made for."""
    if any(override.startswith("task=") for override in overrides):
        return list(overrides)
    info = model_info(str(model.name))
    classes = "vocab_size" in info.fields and getattr(model.config, "n_classes", None) is not None
    if classes:
        return ["task=classification", *overrides]
    chosen = any(override.startswith("data=") for override in overrides)
    return [f"task={info.task}", *([] if chosen else [f"data={info.data}"]), *overrides]


def _with_own_codec(data: dict[str, Any], source: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of data that a codec makes tokens of, with the codec that the model was trained with."""
    if "codec" not in data or any(override.startswith("data.codec=") for override in overrides):
        return data
    return {**data, "codec": str(source)} if (source / DESCRIPTION).is_file() else data


def _with_own_tokenizer(
    data: dict[str, Any], source: Path, trained_on: Mapping[str, Any] | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The settings of text to measure, with the tokenizer that the model in `found` was trained with."""
    if "tokenizer" not in data or any(override.startswith("data.tokenizer=") for override in overrides):
        return data
    if any((source / name).is_file() for name in tokenizers.FILES):
        return {**data, "tokenizer": str(source), "vocab_size": None}
    own = (trained_on or {}).get("tokenizer")
    if own is None or not any(override.startswith("data=") for override in overrides):
        return data
    if own == "sentencepiece":
        raise UserError(
            f"other data need the run's own tokenizer, which {source} does not hold; zoo resume finishes the run and "
            "saves it"
        )
    return {**data, "tokenizer": own, "vocab_size": None}
