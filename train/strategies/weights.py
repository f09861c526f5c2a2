"""Where weights lie, as a setting: the class with whole weights makes one with cut weights where it is asked to."""

import inspect
from typing import Any

from zoo.errors import UserError
from zoo.train.strategies.settings import WEIGHTS, one_of

__all__ = ["refuse_weights", "with_weights"]


def with_weights(whole: Any, cut: type, settings: dict[str, Any]) -> Any:
    """`whole`, not yet initialised, or a `cut` one that is, as the settings say.

    Args:
        whole: an object of the class with the weights on every rank, from its `__new__`.
        cut: the class with the weights cut over all ranks.
        settings: what the constructor was given; a setting that `cut` does not take must have its default.

    Raises:
        UserError: a value of `weights` that is not known, or a setting that cut weights cannot have.
    """
    weights = settings.get("weights", WEIGHTS[0])
    one_of("weights", weights, WEIGHTS)
    if weights == WEIGHTS[0]:
        return whole
    takes = inspect.signature(cut).parameters
    defaults = inspect.signature(type(whole).__init__).parameters
    given = {name: value for name, value in settings.items() if name != "weights"}
    for name, value in given.items():
        if name in defaults and name not in takes and value != defaults[name].default:
            raise UserError(
                f"strategy.{name} is for weights on every rank, and strategy.weights={weights} cuts them; leave it out"
            )
    return cut(**{name: value for name, value in given.items() if name in takes or name not in defaults})


def refuse_weights(weights: str, strategy: object) -> None:
    """A class that has its weights on every rank, such as one derived from ours, stays so.

    Raises:
        UserError: other weights were asked for.
    """
    if weights != WEIGHTS[0]:
        raise UserError(
            f"strategy.weights must be {WEIGHTS[0]} for {type(strategy).__name__}, which keeps them on every rank; got "
            f"{weights}"
        )
