"""Parameter counts without the memory: the model is built on the meta device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.errors import UserError
from zoo.layers.offload import free_host_memory

PER_SQUARE = 64  # no registered model has more parameters than this times its layers and its two largest sizes


def build_on_meta(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """The model with shapes and no numbers."""
    with torch.device("meta"):
        return build(config)


def count_parameters(build: Callable[[Any], nn.Module], config: Any) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in build_on_meta(build, config).parameters())


def refuse_too_large(name: str, build: Callable[[Any], nn.Module], config: Any) -> None:
    """Refuse a model whose parameters do not fit in the memory of torch's default device, before any is allocated.

    Raises:
        UserError: with what the parameters take and what there is.
    """
    free, where = _free_memory(torch.get_default_device())
    size = torch.get_default_dtype().itemsize
    if _bound(config) * size <= min(free, 2**50):
        return  # the count, a second building of the model, is spared where nothing can come of it
    try:
        with torch.random.fork_rng(devices=[]):
            needed = sum(p.numel() * p.element_size() for p in build_on_meta(build, config).parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        if _bound(config) < 2**40:
            raise
        raise UserError(f"model {name!r}: its parameters are too many to be counted; take smaller sizes") from error
    if needed > free:
        raise UserError(
            f"model {name!r}: its parameters take {_gib(needed)} and {where} has {_gib(free)} left; take smaller sizes"
        )


def _bound(config: Any) -> int:
    """More parameters than a config can ask for, from its numbers alone."""
    numbers = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), int | float)
    }
    layers = max(1, int(numbers.pop("n_layers", 1)))
    factors = [max(1, value) for name, value in numbers.items() if name.startswith("expand")]
    sizes = [value for value in numbers.values() if isinstance(value, int)]
    sizes = sorted([*sizes, int(numbers.get("d_model", 1))])[-2:]  # a matrix may be of the width twice
    return math.prod([PER_SQUARE, layers, *(max(1, size) for size in sizes), *(math.ceil(f) for f in factors)])


def _free_memory(device: torch.device) -> tuple[float, str]:
    """Bytes that parameters can have there; a device that cannot be asked has no end."""
    if device.type == "cpu":
        return free_host_memory(), "this machine"
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, str(device)
    return math.inf, str(device)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
