"""The pattern grammar: heterogeneous stacks as data.

    pattern = layer ("," layer)*                   layer = (term | "(" pattern ")") ["*" count]
    term    = item ("+" item)*                     item  = name ["(" key "=" value ("," key "=" value)* ")"]

"deltanet*3, attention(window=512)" is three DeltaNet layers and a windowed attention layer, repeated to the model's
depth. "mamba2 + attention" is one layer with both side by side, their outputs summed. Parentheses that follow no name
make a group: "(gla*3, attention)*2". A count stands behind a whole term: "mamba2 + attention*3" is three such layers.
Values are Python literals; a bare word is a string.
"""

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zoo.errors import remedy
from zoo.layers.mixer_registry import MIXERS, MixerMaker
from zoo.layers.mixers.parallel import Parallel

_NAME = re.compile(r"\s*(?P<name>[a-z_][a-z0-9_]*)\s*(?:\((?P<options>[^()]*)\))?\s*")
_COUNT = re.compile(r"\s*\*\s*(?P<count>\d+)\s*")
_SIGN = re.compile(r"\s*(?P<sign>[,+()])\s*")


@dataclass(frozen=True)
class Item:
    """A mixer of a pattern: its name and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


Term = tuple[Item, ...]  # the mixers of one layer, side by side


def parse_pattern(pattern: str) -> list[Term]:
    """Read a pattern into its layers, groups and counts multiplied out.

    Returns:
        for each layer its mixers; nearly always one.

    Raises:
        ValueError: the text does not follow the grammar.
    """
    reader = _Reader(pattern)
    layers = reader.pattern()
    if reader.position != len(pattern) or not layers:
        raise ValueError(_refusal(pattern, reader.position if layers else 0))
    return layers


class _Reader:
    """Reads a pattern from the left, one method for each rule of the grammar."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def pattern(self) -> list[Term]:
        layers = self.layer()
        while self.sign(","):
            layers += self.layer()
        return layers

    def layer(self) -> list[Term]:
        if self.sign("("):
            terms = self.pattern()
            if not self.sign(")"):
                raise ValueError(_refusal(self.text, self.position))
        else:
            terms = [self.term()]
        count = self.match(_COUNT)
        return terms * (int(count["count"]) if count else 1)

    def term(self) -> Term:
        items = [self.item()]
        while self.sign("+"):
            items.append(self.item())
        return tuple(items)

    def item(self) -> Item:
        match = self.match(_NAME)
        if match is None:
            raise ValueError(_refusal(self.text, self.position))
        return Item(match["name"], _options(self.text, match["options"]))

    def sign(self, sign: str) -> bool:
        match = _SIGN.match(self.text, self.position)
        if match is None or match["sign"] != sign:
            return False
        self.position = match.end()
        return True

    def match(self, rule: re.Pattern[str]) -> re.Match[str] | None:
        match = rule.match(self.text, self.position)
        self.position = self.position if match is None else match.end()
        return match


def _refusal(pattern: str, position: int) -> str:
    return (
        "a pattern is 'name(key=value)*count' items with commas between, + for mixers side by side and parentheses for "
        f"groups; got {pattern!r}, unclear from {pattern[position:]!r}; write for example 'deltanet*3, "
        "attention(window=512)'"
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
    layers = parse_pattern(pattern)
    if n_layers % len(layers):
        raise ValueError(f"a pattern must divide n_layers = {n_layers}; {pattern!r} has {len(layers)} layers")
    makers = {**MIXERS, **own}
    for item in itertools.chain.from_iterable(layers):
        if item.name not in makers:
            raise ValueError(f"no mixer {item.name!r} for a pattern; known are {', '.join(sorted(makers))}")
        _check_options(item, makers[item.name])

    def make(i: int) -> nn.Module:
        made = [_made(item, makers[item.name], d_model) for item in layers[i % len(layers)]]
        return made[0] if len(made) == 1 else Parallel(d_model, made)

    return make


def _made(item: Item, maker: MixerMaker, d_model: int) -> nn.Module:
    try:
        return maker(d_model, **item.options)
    except TypeError as error:
        if not item.options:
            raise
        written = ", ".join(f"{key}={value!r}" for key, value in item.options.items())
        raise ValueError(f"the mixer {item.name!r} of a pattern does not take ({written}): {error}") from error
