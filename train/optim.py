"""The optimiser's recipe: which parameters decay, and how the learning rate moves."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zoo.layers.mixer import Layer, LimitsRates
from zoo.ranges import Range, check_fields

__all__ = ["AdamW", "Limits", "Recipe", "learning_rate_factor", "learning_rate_limits", "parameter_groups"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When training ends: after `max_steps` updates or `max_seconds`, whichever comes first; None is no limit."""

    max_steps: int | None = None
    max_seconds: float | None = None

    def progress(self, step: int, elapsed: float) -> float:
        """The part of the training that is behind us, in [0, 1], by the limit that is nearer."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = elapsed / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def reached(self, step: int, elapsed: float) -> bool:
        """Whether training should end now."""
        return (self.max_steps is not None and step >= self.max_steps) or (
            self.max_seconds is not None and elapsed >= self.max_seconds
        )


def learning_rate_factor(step: int, progress: float, *, warmup_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up times a cosine from 1 to `min_lr_ratio`.

    Args:
        step: updates done so far; the first update has step 0.
        progress: the part of the training that is behind us, in [0, 1].
        warmup_steps: the update at which the warm-up reaches 1; 0 for none.
        min_lr_ratio: the floor of the cosine.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * (min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Sort the trainable parameters into "decay" and "no_decay", each a list of (name, parameter).

    Only the weight matrices of Linear and Embedding decay. Norms, biases, decay rates and other vectors, and short
    convolutions do not. A zoo.layers.Layer says otherwise of its own parameters by `weight_decay`; modules of other
    libraries mark them, `parameter._no_weight_decay = True` or `parameter._weight_decay = True`. A tied parameter
    counts once.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"decay": [], "no_decay": []}
    declared = {
        id(layer.get_parameter(name)): decays
        for layer in model.modules()
        if isinstance(layer, Layer)
        for name, decays in layer.weight_decay.items()
    }
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            matrix = isinstance(module, nn.Linear | nn.Embedding) and parameter.ndim == 2
            marked = isinstance(parameter, _MarkedToDecay) and parameter._weight_decay
            spared = isinstance(parameter, _MarkedNotToDecay) and parameter._no_weight_decay
            decays = declared.get(id(parameter), matrix or marked) and not spared
            full_name = f"{prefix}.{name}" if prefix else name
            groups["decay" if decays else "no_decay"].append((full_name, parameter))
    return groups


@runtime_checkable
class _MarkedToDecay(Protocol):
    """A parameter with the mark of another library, as Mamba's own code sets it; our layers say it by a member."""

    _weight_decay: bool


@runtime_checkable
class _MarkedNotToDecay(Protocol):
    _no_weight_decay: bool


def learning_rate_limits(model: nn.Module) -> dict[int, float]:
    """id of a parameter -> the learning rate that it must not exceed.

    A module says so by `max_learning_rates`, a mapping from names of its own parameters: decay rates and step sizes of
    state spaces stand in exponents and want smaller steps than matrices.
    """
    limits: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, LimitsRates):
            own = dict(module.named_parameters(recurse=False))
            limits |= {id(own[name]): limit for name, limit in module.max_learning_rates.items() if name in own}
    return limits


class Recipe(ABC):
    """How weights are updated: an optimiser and its learning rate. What `optim` of a config names inherits from it."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser for `model`; its update can be skipped on the device by setting `found_inf`."""

    @abstractmethod
    def lr_at(self, step: int, progress: float) -> float:
        """The learning rate of the update that follows `step` updates, at `progress` in [0, 1] of the training."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Recipe):
    """AdamW with weight decay on matrices only, linear warm-up and a cosine to a floor.

    Args:
        lr: the peak learning rate; 2e-3 suits the tiny sizes, large models want less.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of learning rate, on the "decay" group of `parameter_groups`.
        warmup_steps: updates until the peak.
        min_lr_ratio: the cosine ends at this part of the peak.
    """

    lr: Annotated[float, Range(above=0)] = 2e-3
    betas: Annotated[tuple[float, float], Range(0, below=1)] = (0.9, 0.95)
    eps: Annotated[float, Range(0)] = 1e-8
    weight_decay: Annotated[float, Range(0)] = 0.1
    warmup_steps: Annotated[int, Range(0)] = 50
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "optim.")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser for `model`; fused, so that a step can be skipped on the device without asking the host."""
        limits = learning_rate_limits(model)
        decay = {"decay": self.weight_decay, "no_decay": 0.0}
        groups: list[dict[str, Any]] = []
        for kind, members in parameter_groups(model).items():
            by_scale: dict[float, list[nn.Parameter]] = {1.0: []}
            for _, p in members:
                by_scale.setdefault(min(1.0, limits.get(id(p), self.lr) / self.lr), []).append(p)
            groups += [
                {"params": params, "weight_decay": decay[kind], "lr_scale": scale} for scale, params in by_scale.items()
            ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )
        set_lr(optimizer, self.lr)
        return optimizer

    def lr_at(self, step: int, progress: float) -> float:
        """The learning rate of the update that follows `step` updates."""
        return self.lr * learning_rate_factor(
            step, progress, warmup_steps=self.warmup_steps, min_lr_ratio=self.min_lr_ratio
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of the optimiser this learning rate, times the group's own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all parameters that have one, in the order of the optimiser."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
