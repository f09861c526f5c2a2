"""Tables of integers that calls share: made once, for training and decoding alike."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

__all__ = ["cached_tensors"]

P = ParamSpec("P")
T = TypeVar("T")


def cached_tensors(maxsize: int | None = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator for a function of hashable arguments that makes tensors: the newest results are kept.

    They are made outside of inference mode. A tensor that decoding made there could not be used in training later.

    Args:
        maxsize: results that are kept; None for all.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):
                return make(*args, **kwargs)

        return cast(Callable[P, T], functools.lru_cache(maxsize=maxsize)(made))

    return decorate
