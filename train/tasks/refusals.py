"""What tasks refuse: another model, data of another kind, several losses where their counts cannot be known."""

from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError
from zoo.train.contracts import MakesPlans

__all__ = ["no_counts", "refuse_classes", "refuse_other_model", "refuse_uneven_steps", "refuse_unknown_counts"]


def refuse_other_model(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model than the run's config describes.

    Args:
        now: what `zoo.checkpoint.describe` says of the run's model.
        then: what the checkpoint has of its own.

    Raises:
        UserError: names or fields differ.
    """
    if now["model"] != then["model"]:
        raise UserError(
            f"the run cannot go on: its config.yaml says model.name={now['model']} and its checkpoint holds a "
            f"{then['model']}; put the run's own config.yaml back"
        )
    for field, value in now["config"].items():
        if field in then["config"] and then["config"][field] != value:
            raise UserError(
                f"the run cannot go on: its config.yaml says model.{field}={value} and its checkpoint was trained "
                f"with {then['config'][field]}; put the run's own config.yaml back, or start a new run"
            )


def refuse_classes(task: str, data: Any) -> None:
    """Refuse data that label whole sequences, for a task about tokens."""
    if getattr(data, "n_classes", None) is not None:
        raise UserError(
            f"task={task} is about tokens, and {type(data).__name__} labels whole sequences; use task=classification"
        )


def refuse_uneven_steps(strategy: object, task: str) -> None:
    """Refuse a strategy that plans, for a task of several losses.

    Raises:
        UserError: its ranks have unequal numbers of micro-batches, and could not exchange counts in each.
    """
    if isinstance(strategy, MakesPlans):
        raise UserError(
            f"plans give ranks unequal numbers of micro-batches, and {task} exchanges the counts of its several losses "
            "in each; use strategy=ddp"
        )


def refuse_unknown_counts(together: int) -> None:
    """Refuse an update of `together` batches whose counts nobody has said ahead.

    Raises:
        UserError: there is more than one.
    """
    if together != 1:
        raise UserError(
            "several losses with trainer.accumulate_grad_batches need the counts of a whole update ahead; train by "
            "zoo.train.run.fit, or wrap the data in zoo.train.run.endless_epoch.EndlessData(data, task)"
        )


def no_counts(task: str) -> UserError:
    """The error of a task of several losses that does not say their counts ahead."""
    return UserError(
        f"{task} has several losses, whose counts must be known before the first batch of an update of several; give "
        "it a method counts(batch), or set trainer.accumulate_grad_batches=1"
    )
