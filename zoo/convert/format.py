"""What a foreign format is: how to recognise it, what its config means, and how its tensors are called."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from zoo.convert.fields import Fields

Shape = tuple[int, ...]


class Described(NamedTuple):
    """A model of the registry, as a foreign config describes it."""

    model: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Names:
    """Our names of tensors -> a foreign format's, by prefixes.

    whole: prefixes outside the layers; layers: the foreign prefix of layer i, with {i}; inside: prefixes in a layer.
    The longest prefix that fits is replaced.
    """

    whole: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]

    def __call__(self, ours: str) -> str:
        layer = re.match(r"blocks\.(\d+)\.(.*)", ours)
        if layer is None:
            return _replace_prefix(ours, self.whole)
        return self.layers.replace("{i}", layer[1]) + _replace_prefix(layer[2], self.inside)


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    fits = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fits:
        raise KeyError(f"no foreign name for {name!r}")
    longest = max(fits, key=len)
    return prefixes[longest] + name.removeprefix(longest)


def as_stored(name: str, names: Collection[str]) -> tuple[str, ...]:
    """A stored tensor stands for itself."""
    return (name,)


def same_shape(ours: str, shape: Shape) -> Shape:
    """A tensor is stored in our shape."""
    return shape


def convolutions_by_channel(ours: str, shape: Shape) -> Shape:
    """Depthwise convolutions are stored as torch.nn.Conv1d has them: (D, 1, W) where ours are (D, W)."""
    return (shape[0], 1, shape[1]) if re.search(r"\.(convs\.\d+|conv1d)\.weight$", ours) and len(shape) == 2 else shape


@dataclass(frozen=True)
class Format:
    """A foreign format of checkpoints.

    Attributes:
        kind: what it is called in a sentence.
        types: the values of model_type that it reads.
        describe: the model that a config.json means; takes every field out.
        names: our name of a tensor -> the foreign one.
        stands_for: (stored name, all stored names) -> the present names of what it holds: several when it holds them
            stacked, none when the format lets it be left out, otherwise one.
        stored_shape: (our name, our shape) -> the shape in which the tensor is stored.
        recognises: further signs of the format, for configs without model_type.
        models: names of the registry that `undescribe` writes in this format.
        undescribe: a model -> config.json; None where nothing is exported to this format.
        scales: a model -> {our name: factor} for tensors that are stored as multiples of ours.
    """

    kind: str
    types: tuple[str, ...]
    describe: Callable[[Fields], Described]
    names: Callable[[str], str]
    stands_for: Callable[[str, Collection[str]], tuple[str, ...]] = as_stored
    stored_shape: Callable[[str, Shape], Shape] = same_shape
    recognises: Callable[[Mapping[str, Any]], bool] = lambda values: False
    models: tuple[str, ...] = ()
    undescribe: Callable[[nn.Module], dict[str, Any]] | None = None
    scales: Callable[[nn.Module], dict[str, float]] = lambda model: {}
