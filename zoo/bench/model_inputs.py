"""What goes into a model that is measured: of this tree, or of an older commit whose models all took tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

try:
    from zoo.layers.model import as_model
except ModuleNotFoundError:  # this code measures older commits, too
    as_model = None  # type: ignore[assignment]

__all__ = ["arguments", "example", "sizes", "targets", "units"]


def example(model: nn.Module, batch: int, length: int, device: torch.device | str) -> dict[str, Tensor]:
    """A valid batch of the model's inputs."""
    if as_model is None:
        return {"tokens": torch.zeros(batch, length, dtype=torch.int64, device=device)}
    return as_model(model).example(batch, length, device=device)


def arguments(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch of data that the model takes."""
    if as_model is None:
        return {name: batch[name] for name in ("tokens", "cu_seqlens") if name in batch}
    return as_model(model).arguments(batch)


def units(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """How many tokens (images, ...) a batch holds."""
    return batch["tokens"].numel() if as_model is None else as_model(model).units(batch)


def sizes(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """B, and T where the model's first input has time, of a batch."""
    if as_model is None:
        return dict(zip(("B", "T"), batch["tokens"].shape, strict=True))
    first = as_model(model).inputs[0]
    named = dict(zip(first.shape.split(), batch[first.name].shape, strict=True))
    return {name: named[name] for name in ("B", "T") if name in named}


def targets(batch: Mapping[str, Tensor]) -> Tensor:
    """What the outputs are compared with."""
    return batch["targets"] if "targets" in batch else batch["labels"]
