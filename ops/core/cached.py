"""Tables of integers that calls share: made once, for training and decoding alike."""

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["cached_tensors"]

P, T = ParamSpec("P"), TypeVar("T")


def cached_tensors(maxsize: int | None = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator for a function of hashable arguments that makes tensors: the newest results are kept.

    They are made outside of inference mode. A tensor that decoding made there could not be used in training later.

    Args:
        maxsize: results that are kept; None for all.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @functools.lru_cache(maxsize=maxsize)
        def kept(arguments: tuple[Hashable, ...], named: tuple[tuple[str, Hashable], ...]) -> T:
            with torch.inference_mode(False):
                return make(*arguments, **dict(named))  # type: ignore[call-arg,arg-type]

        @functools.wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return kept(args, tuple(sorted(kwargs.items())))

        return call

    return decorate
