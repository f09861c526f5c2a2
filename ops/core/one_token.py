"""A short way for a token of decoding, past the checks that all calls of its kind share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from zoo.ops.shard.scope import scope

P = ParamSpec("P")
R = TypeVar("R")

MOST_KINDS = 256  # of one-token calls that an operator remembers


def quick(whole: Callable[P, R], step: Callable[P, R], watchers: Sequence[object]) -> Callable[P, R]:
    """The operator, with a short way for a token of decoding: checks are made once for all calls that look alike.

    On a CPU most of such a call's time goes into the way to the arithmetic. The first call of each kind (shapes,
    dtypes, devices and options) goes the long way, on which what does not fit is refused; the next ones call `step`.
    All that a kind says is asked once, so that the common way is a look-up.

    Args:
        whole: the long way, which takes every call.
        step: takes the same arguments, those of one token.
        watchers: while it is not empty, every call goes the long way, on which watchers are told.
    """
    passed: set[tuple[object, ...]] = set()

    @functools.wraps(whole)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or watchers
            or torch.is_autocast_enabled("cpu")
            or scope() is not None
        ):
            return whole(*args, **kwargs)
        parts: list[object] = [*kwargs]
        for x in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(x, Tensor):
                parts += x.shape, x.dtype, x.is_cpu
            else:
                parts.append(x)
        kind = tuple(parts)
        try:
            known = kind in passed
        except TypeError:  # a list in a tensor's place is refused on the long way
            return whole(*args, **kwargs)
        if known:
            return step(*args, **kwargs)
        result = whole(*args, **kwargs)
        if _decodes(args, kwargs):
            if len(passed) >= MOST_KINDS:
                passed.clear()
            passed.add(kind)
        return result

    return run


def _decodes(args: tuple[object, ...], options: Mapping[str, object]) -> bool:
    """Whether a call that was not refused is one token a row on a CPU, all tensors float32, or all float64."""
    tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    return (
        bool(args)
        and tensors[0] is args[0]
        and tensors[0].shape[1] == 1
        and all(x.is_cpu for x in tensors)
        and {x.dtype for x in tensors} in ({torch.float32}, {torch.float64})
        and options.get("cu_seqlens") is None
        and options.get("backend", "auto") in ("auto", "torch")
    )
