"""The model of a composed config, which must hold what the data have; the surroundings of a run's processes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from zoo.errors import UserError
from zoo.registry import create_model, list_models, model_info
from zoo.train.run.folder import RunFolder
from zoo.train.tasks.task import Task

RUN_DIR = "ZOO_RUN_DIR"  # tells the processes that Lightning starts for further devices which folder is the run's
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", RUN_DIR)  # set for those processes


def build_model(section: Mapping[str, Any], data: Any, task: type[Task]) -> nn.Module:
    """The model, with the vocabulary (and the classes) of the data unless the user wants more."""
    fields = {key: value for key, value in section.items() if key not in ("name", "size")}
    for field, value in fields_of(task, data).items():
        if field not in model_info(section["name"]).fields:
            having = [name for name in list_models() if field in model_info(name).fields]
            raise UserError(
                f"{task.__name__} needs a model with the field {field}, and {section['name']} has none; "
                f"{', '.join(having) if having else 'no model'} can be trained by it"
            )
        if fields.get(field) is None:
            fields[field] = value
    model = create_model(section["name"], section["size"], **fields)
    check_fields(model, data, task)
    return model


def fields_of(task: type[Task], data: Any) -> dict[str, Any]:
    """`task.fields(data)`, for any data.

    Raises:
        UserError: the data lack what the task asks for.
    """
    try:
        return task.fields(data)
    except AttributeError as error:
        if error.obj is not data:
            raise
        raise UserError(
            f"{task.__name__} asks its data for {error.name}, and {type(data).__name__} has none; choose other data "
            "or the task that the data are for"
        ) from error


def check_fields(model: nn.Module, data: Any, task: type[Task]) -> None:
    """Refuse a model that has no room for the tokens or the classes of the data."""
    for field, least in fields_of(task, data).items():
        size = getattr(model.config, field, None)
        if size is None or size < least:
            what = {"vocab_size": "tokens", "n_classes": "classes"}.get(field, field)
            raise UserError(
                f"the model must hold what the data have: model.{field} is {size} and the data have {least} {what} for "
                f"{task.__name__}; leave model.{field} out or choose other data"
            )


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
