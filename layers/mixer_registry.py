"""Mixers by the names that patterns use; each registers itself, beside its class."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["MIXERS", "MixerMaker", "register_mixer"]

MixerMaker = Callable[..., nn.Module]  # (d_model, **options) -> mixer
Maker = TypeVar("Maker", bound=MixerMaker)

MIXERS: dict[str, MixerMaker] = {}


def register_mixer(name: str) -> Callable[[Maker], Maker]:
    """Make a mixer class usable in patterns: `@register_mixer("leaky") class Leaky(Mixer): ...`.

    The class is called as `maker(d_model, **options)` with the options written in the pattern.

    Raises:
        ValueError: the name belongs to another mixer.
    """

    def add(maker: Maker) -> Maker:
        if MIXERS.setdefault(name, maker) is not maker:
            raise ValueError(f"a mixer's name is used once; {name!r} is already {MIXERS[name]!r}, choose another")
        return maker

    return add
