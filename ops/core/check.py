"""Argument checks shared by the public operators: each failure is rule, fact and remedy in one sentence."""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_CHECKED_BOUNDARIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cu_seqlens tensor -> (version, tuple of ints)


def shapes(operator: str, args: Mapping[str, tuple[Tensor | None, str]], **known: int) -> dict[str, int]:
    """Check tensors against named dimensions and return the size of each name.

    Args:
        operator: the name that starts every error.
        args: argument name -> (tensor or None, its dimensions as "B T H K"); None is passed over. The first argument
            to use a name fixes its size. All tensors must be of one device and floating.
        known: sizes that are fixed beforehand.

    Raises:
        ValueError: rank, size, device or dtype of an argument is off.
    """
    sizes, origin = dict(known), dict.fromkeys(known, "")
    first: tuple[str, Tensor] | None = None
    for name, (x, dims) in args.items():
        if x is None:
            continue
        names = dims.split()
        if not isinstance(x, Tensor):
            raise ValueError(f"{operator}: {name} must be a tensor {_wanted(names)}; got {type(x).__name__}")
        shape = x.shape
        if len(shape) != len(names):
            raise ValueError(
                f"{operator}: {name} must be {_wanted(names)}, {len(names)} dimensions; got {tuple(shape)}"
            )
        for dim, size in zip(names, shape, strict=True):
            if dim not in sizes:
                sizes[dim], origin[dim] = size, name
            elif sizes[dim] != size:
                since = f" as in {origin[dim]}" if origin[dim] else ""
                raise ValueError(
                    f"{operator}: {name} must be {_wanted(names)} with {dim} = {sizes[dim]}{since}; got {tuple(shape)}"
                )
        if not x.is_floating_point():
            raise ValueError(f"{operator}: {name} must be a floating tensor; got {x.dtype}, convert it with .float()")
        if first is None:
            first = (name, x)
        elif x.device != first[1].device:
            here, there = first[1].device, x.device
            raise ValueError(
                f"{operator}: all tensors must be on one device; {first[0]} is on {here}, {name} on {there}"
            )
    return sizes


def _wanted(names: list[str]) -> str:
    return f"({', '.join(names)})"


def in_rows(operator: str, last: str, **args: Tensor | None) -> list[Tensor | None]:
    """Tensors of one shape (..., F) as (1, rows, F), for operators that look along the last dimension alone.

    Args:
        operator: the name that starts every error.
        last: the name of the last dimension.
        args: tensors, the first one not None; None stays.

    Raises:
        ValueError: shapes or devices differ, a number without dimensions, or no floats.
    """
    first = next(iter(args.values()))
    assert first is not None
    if not first.ndim:
        raise ValueError(f"{operator}: {next(iter(args))} must be (..., {last}), 1 dimension or more; got a number")
    before = first.shape[:-1]
    dims = " ".join([*(f"N{i}" for i in range(len(before))), last])
    shapes(operator, {name: (x, dims) for name, x in args.items()})
    return [None if x is None else x.reshape(1, math.prod(before), x.shape[-1]) for x in args.values()]


def same_dtype(operator: str, **args: Tensor | None) -> None:
    """Refuse a mix of float dtypes among the named arguments; None is passed over."""
    if len({x.dtype for x in args.values() if x is not None}) > 1:
        given = {name: x.dtype for name, x in args.items() if x is not None}
        dtypes = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in given.items())
        raise ValueError(f"{operator}: {', '.join(given)} must share one dtype; got {dtypes}")


def boundaries(operator: str, cu_seqlens: Tensor, batch: int, length: int) -> tuple[int, ...]:
    """The document boundaries of a packed row as Python ints; checked once per tensor (one device synchronisation).

    Raises:
        ValueError: batch is not 1, or cu_seqlens is not a 1-D integer tensor 0 = c_0 <= c_1 <= ... <= c_n = length.
    """
    if batch != 1:
        raise ValueError(
            f"{operator}: packed sequences have batch size 1; got B = {batch}, flatten them to (1, B * T, ...)"
        )
    version = None if cu_seqlens.is_inference() else cu_seqlens._version  # inference tensors count no versions
    seen = _CHECKED_BOUNDARIES.get(cu_seqlens)
    if seen is None or version is None or seen[0] != version:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
            raise ValueError(
                f"{operator}: cu_seqlens must be a 1-D int32 or int64 tensor of at least 2 boundaries; "
                f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        seen = (version, tuple(cu_seqlens.tolist()))
        _CHECKED_BOUNDARIES[cu_seqlens] = seen
    cuts: tuple[int, ...] = seen[1]
    if cuts[0] != 0 or cuts[-1] != length:
        raise ValueError(
            f"{operator}: cu_seqlens must start at 0 and end at T = {length}; got {cuts[0]} and {cuts[-1]}"
        )
    for left, right in itertools.pairwise(cuts):
        if right < left:
            raise ValueError(f"{operator}: cu_seqlens must not decrease; got {left} followed by {right}, sort it")
    return cuts
