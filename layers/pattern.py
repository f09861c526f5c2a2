"""The pattern grammar: heterogeneous stacks as data.

    pattern = item ("," item)*          item = name ["(" key "=" value ("," key "=" value)* ")"] ["*" count]

"deltanet*3, attention(window=512)" is three DeltaNet layers and a windowed attention layer, repeated to the model's
depth. Values are Python literals; a bare word is a string.
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zoo.errors import remedy
from zoo.layers.mixer_registry import MIXERS, MixerMaker

_ITEM = re.compile(r"\s*(?P<name>[a-z_][a-z0-9_]*)\s*(?:\((?P<options>[^()]*)\))?\s*(?:\*\s*(?P<count>\d+))?\s*")


@dataclass(frozen=True)
class Item:
    """One layer of a pattern: the mixer's name and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_pattern(pattern: str) -> list[Item]:
    """Read a pattern into its layers, counts multiplied out.

    Raises:
        ValueError: the text does not follow the grammar.
    """
    items: list[Item] = []
    position = 0
    while True:
        match = _ITEM.match(pattern, position)
        if match is None:
            raise ValueError(_refusal(pattern, position))
        items += [Item(match["name"], _options(pattern, match["options"]))] * int(match["count"] or 1)
        position = match.end()
        if position == len(pattern):
            break
        if pattern[position] != ",":
            raise ValueError(_refusal(pattern, position))
        position += 1
    if not items:
        raise ValueError(_refusal(pattern, 0))
    return items


def _refusal(pattern: str, position: int) -> str:
    return (
        f"a pattern is 'name(key=value)*count' items with commas between; got {pattern!r}, unclear from "
        f"{pattern[position:]!r}; write for example 'deltanet*3, attention(window=512)'"
    )


def _options(pattern: str, text: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(str.strip, (text or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise ValueError(_refusal(pattern, pattern.find(part)))
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = {"true": True, "false": False, "none": None, "null": None}.get(value.lower(), value)
    return options


def _check_options(item: Item, maker: MixerMaker) -> None:
    """Refuse an option that a mixer does not have; its first parameter, the width, is the model's to give."""
    _, *parameters = inspect.signature(maker).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in item.options:
        if option not in known:
            end = remedy(option, known, f"it has {', '.join(known)}")
            raise ValueError(f"the mixer {item.name!r} of a pattern has no option {option!r}{end}")


def layer_mixers(
    d_model: int, n_layers: int, pattern: str, own: Mapping[str, MixerMaker]
) -> Callable[[int], nn.Module]:
    """A maker of the mixer of layer i from a pattern, repeated until it fills n_layers.

    Args:
        d_model: width given to every mixer.
        n_layers: depth; must be a multiple of the pattern's length.
        pattern: the text.
        own: makers that take the model's own configuration into account; they go before `MIXERS`.

    Raises:
        ValueError: an unknown mixer or option, an option of another type, or a pattern that does not divide n_layers.
    """
    items = parse_pattern(pattern)
    if n_layers % len(items):
        raise ValueError(f"a pattern must divide n_layers = {n_layers}; {pattern!r} has {len(items)} layers")
    makers = {**MIXERS, **own}
    for item in items:
        if item.name not in makers:
            raise ValueError(f"no mixer {item.name!r} for a pattern; known are {', '.join(sorted(makers))}")
        _check_options(item, makers[item.name])

    def make(i: int) -> nn.Module:
        item = items[i % len(items)]
        try:
            return makers[item.name](d_model, **item.options)
        except TypeError as error:
            if not item.options:
                raise
            written = ", ".join(f"{key}={value!r}" for key, value in item.options.items())
            raise ValueError(f"the mixer {item.name!r} of a pattern does not take ({written}): {error}") from error

    return make
