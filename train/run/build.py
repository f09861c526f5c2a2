"""What a composed config names, made: data, model, strategy, the trainer's settings, the processes' surroundings."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from zoo.errors import UsageError, UserError
from zoo.registry import create_model, model_info
from zoo.targets import TARGET, load_class
from zoo.train.optim import Limits, Recipe
from zoo.train.run.folder import RunFolder
from zoo.train.run.trainer import TrainerConfig
from zoo.train.tasks.task import Task

RUN_DIR = "ZOO_RUN_DIR"  # tells the processes that Lightning starts for further devices which folder is the run's
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", RUN_DIR)  # set for those processes


def build_data(config: Mapping[str, Any]) -> Any:
    """The data module of a composed config, with the run's seed where it takes one and the user gave none."""
    owner = load_class("data", config["data"][TARGET])
    settings = settings_of(config["data"])
    if "seed" in inspect.signature(owner).parameters:
        settings.setdefault("seed", config["seed"])
    with refused_settings():
        return owner(**settings)


@contextmanager
def refused_settings() -> Iterator[None]:
    """Around a constructor that takes a group's settings: what it refuses is a UsageError, and the exit code is 2."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from error


def build_model(section: Mapping[str, Any], data: Any, task: type[Task]) -> nn.Module:
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
    check_fields(model, data, task)
    return model


def check_fields(model: nn.Module, data: Any, task: type[Task]) -> None:
    """Refuse a model that has no room for the tokens or the classes of the data."""
    for field, least in task.fields(data).items():
        size = getattr(model.config, field, None)
        if size is None or size < least:
            what = {"vocab_size": "tokens", "n_classes": "classes"}.get(field, field)
            raise UserError(
                f"the model must hold what the data have: model.{field} is {size} and the data have {least} {what} for "
                f"{task.__name__}; leave model.{field} out or choose other data"
            )


@contextmanager
def readable_refusals() -> Iterator[None]:
    """Around the making of a Trainer: what Lightning refuses becomes a UsageError of one line."""
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UsageError(f"trainer settings that Lightning refuses: {str(error).strip().splitlines()[0]}") from error


def cluster_environment() -> list[ClusterEnvironment]:
    """SLURM without Lightning's requeueing: it writes checkpoints of its own, which it prefers to ours ever after."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []  # what Lightning finds on its own
    return [SLURMEnvironment(auto_requeue=False)]


def trainer_config_of(section: Mapping[str, Any]) -> TrainerConfig:
    """The checked settings of the config's `trainer`."""
    owner = load_class("trainer", section[TARGET]) if TARGET in section else TrainerConfig
    with refused_settings():
        options = owner(**settings_of(section))
    assert isinstance(options, TrainerConfig)
    return options


def task_class(section: Mapping[str, Any]) -> type[Task]:
    """The class of the config's `task`."""
    owner = load_class("task", section[TARGET])
    assert issubclass(owner, Task)
    return owner


def build_task(section: Mapping[str, Any], model: nn.Module, recipe: Recipe, limits: Limits, data: Any) -> Task:
    """The task of a composed config: how `model` is trained and judged on `data`."""
    owner: Callable[..., object] = load_class("task", section[TARGET])
    with refused_settings():
        task = owner(model, recipe, limits, data, **settings_of(section))
    assert isinstance(task, Task)
    return task


def recipe_of(section: Mapping[str, Any]) -> Recipe:
    """The checked settings of the config's `optim`."""
    owner = load_class("optim", section[TARGET])
    with refused_settings():
        recipe = owner(**settings_of(section))
    assert isinstance(recipe, Recipe)
    return recipe


def precision_of(options: TrainerConfig) -> str:
    """As asked for; else bfloat16 where a CUDA device has it, and float32."""
    if options.precision is not None:
        return options.precision
    on_cuda = torch.cuda.is_available() and options.accelerator in ("auto", "gpu", "cuda")
    return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"


def strategy_of(section: Any) -> Any:
    """Lightning's `strategy`: an instance of what the config names, or "auto"."""
    if isinstance(section, Mapping):
        with refused_settings():
            return load_class("strategy", section[TARGET])(**settings_of(section)) if TARGET in section else "auto"
    return section or "auto"


def settings_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a section holds beside its `_target_`."""
    return {key: value for key, value in section.items() if key != TARGET}


@contextmanager
def launch_environment(folder: RunFolder | None = None) -> Iterator[None]:
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
