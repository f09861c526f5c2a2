"""Attentional biases: the inner loss that a memory's weights descend, of its output y and the value v.

Each has its value and, written out, its gradient by y. A proof compares the two.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class InnerLoss(ABC):
    """A loss of one token, a sum over channels.

    thresholded: it takes a threshold a token and head, `delta`.
    """

    thresholded: bool = False

    @abstractmethod
    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """y, v (..., V), delta (..., 1) -> (...)."""

    @abstractmethod
    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """d value / d y, (..., V)."""


@dataclass(frozen=True)
class L2Loss(InnerLoss):
    """||y - v||^2 / 2: the gradient is y - v, not twice that."""

    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """Half the squared distance."""
        return 0.5 * (y - v).square().sum(-1)

    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The residual, once: y - v."""
        return y - v


@dataclass(frozen=True)
class LpLoss(InnerLoss):
    """sum (r^2 + eps)^(p/2) over the channels of r = y - v: |r|^p, smooth at 0, without the factor 1/p.

    Raises:
        ValueError: p < 1 or eps <= 0.
    """

    p: float = 3.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.p < 1 or self.eps <= 0:
            raise ValueError(f"LpLoss: p must be at least 1 and eps above 0; got p = {self.p}, eps = {self.eps}")

    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The smooth sum of p-th powers."""
        return ((y - v).square() + self.eps).pow(self.p / 2).sum(-1)

    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """p r (r^2 + eps)^(p/2 - 1)."""
        r = y - v
        squared = r.square() + self.eps
        return self.p * r * (squared.sqrt() if self.p == 3 else squared.pow(self.p / 2 - 1))


@dataclass(frozen=True)
class HuberLoss(InnerLoss):
    """Squares up to a threshold delta, and what grows linearly beyond it.

    Args:
        form: "norm", the threshold is on the length of r = y - v, so that a gradient is never longer than delta;
            "coordinate", on each channel; "switch", ||r||^2 / 2 up to a length of delta and delta ||r||_1 beyond, as
            the paper's model has it, with a jump at delta.

    Raises:
        ValueError: an unknown form.
    """

    form: Literal["norm", "coordinate", "switch"] = "norm"
    thresholded = True

    def __post_init__(self) -> None:
        if self.form not in ("norm", "coordinate", "switch"):
            raise ValueError(f"HuberLoss: form must be norm, coordinate or switch; got {self.form!r}")

    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """Squares near, lengths far away."""
        assert delta is not None
        r = y - v
        if self.form == "coordinate":
            far = delta * r.abs() - 0.5 * delta.square()
            return torch.where(r.abs() <= delta, 0.5 * r.square(), far).sum(-1)
        squared, delta = r.square().sum(-1), delta.squeeze(-1)
        if self.form == "switch":
            far = delta * r.abs().sum(-1)
        else:  # where the root is taken, it is not 0
            far = delta * torch.maximum(squared, delta.square()).sqrt() - 0.5 * delta.square()
        return torch.where(squared <= delta.square(), 0.5 * squared, far)

    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The residual, or what the threshold leaves of it."""
        assert delta is not None
        r = y - v
        if self.form == "coordinate":
            return torch.where(r.abs() <= delta, r, delta * r.sign())
        squared, limit = r.square().sum(-1, keepdim=True), delta.square()
        if self.form == "switch":
            return torch.where(squared <= limit, r, delta * r.sign())
        return r * torch.where(squared <= limit, 1.0, delta * torch.maximum(squared, limit).rsqrt())


@dataclass(frozen=True)
class DotProductLoss(InnerLoss):
    """-y . v: the gradient is -v, whatever the memory holds; linear attention's."""

    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """Minus the inner product."""
        return -(y * v).sum(-1)

    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """Minus the value, always."""
        return -v


@dataclass(frozen=True)
class KLLoss(InnerLoss):
    """KL(softmax(v) || softmax(y)): the gradient is softmax(y) - softmax(v)."""

    def value(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The divergence of two softmaxes."""
        target = F.log_softmax(v, dim=-1)
        return (target.exp() * (target - F.log_softmax(y, dim=-1))).sum(-1)

    def gradient(self, y: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The difference of two softmaxes."""
        return y.softmax(-1) - v.softmax(-1)
