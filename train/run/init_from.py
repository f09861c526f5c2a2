"""A run that starts from the weights of another: all of them, or a refusal that names every difference."""

from pathlib import Path

from torch import Tensor, nn

from zoo.checkpoint import load
from zoo.errors import UserError
from zoo.train.rng import get_rng_states, set_rng_states

__all__ = ["start_from", "stored_path"]


def start_from(model: nn.Module, path: str) -> None:
    """Give a model the weights of a run or a checkpoint; the generators stay where they are.

    Args:
        model: its weights are written; dtype and device stay its own.
        path: as `zoo.load` takes it: a run's folder, a checkpoint, a folder of another library, owner/name.

    Raises:
        UserError: nothing is there, or its weights have other names or shapes than the model's.
    """
    states = get_rng_states()
    try:
        theirs = load(path)
    finally:
        set_rng_states(states)
    given, own = theirs.state_dict(), model.state_dict()
    differences = _differences(given, own)
    if differences:
        raise UserError(
            f"init_from={path} must hold the weights of the model that is trained, by name and shape, and "
            f"{'; '.join(differences)}{_remedy(theirs, model)}"
        )
    model.load_state_dict(given)


def stored_path(path: str) -> str:
    """A path as a run's config keeps it: the same from any folder. Names on the hub stay as they are."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _differences(given: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    lacking = [name for name in own if name not in given]
    besides = [name for name in given if name not in own]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    parts = (("it lacks", lacking), ("it has besides", besides), ("it has", shapes))
    return [f"{what} {', '.join(names)}" for what, names in parts if names]


def _remedy(theirs: nn.Module, model: nn.Module) -> str:
    """The settings of the model that would fit."""
    if theirs.name != model.name:
        return f"; it is a {theirs.name}, train model={theirs.name} or give weights of a {model.name}"
    fields = {name: value for name, value in vars(theirs.config).items() if getattr(model.config, name, None) != value}
    words = " ".join(f"model.{name}={value}" for name, value in fields.items())
    return f"; it was made with {words}, train such a model or give other weights" if words else "; give other weights"
