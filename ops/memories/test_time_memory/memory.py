"""What is learnt at test time: small networks M(x; W), whose weights W are the recurrent state.

A memory says its matrices, how it reads, and the rank-one factors of its gradient: for one token the gradient of any
loss by matrix l is e_l h_l^T, where h_l is what the matrix sees and e_l what comes back to its output. So a chunk's
sum of gradients is one product, and no gradient of one token is ever formed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Apply = Callable[[int, Tensor], Tensor]  # (which matrix, its inputs (..., in)) -> its outputs (..., out)


class Factors(NamedTuple):
    """The gradient of every token by one matrix, e h^T: e (N, C, out), h (N, C, in)."""

    e: Tensor
    h: Tensor


class Norm(NamedTuple):
    """The slow part of a memory: gain and offset of the norm of its output, to be broadcast; None for 1 and 0."""

    gain: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """A network from keys (K) to values (V).

    Args:
        residual: M(x) = x + ..., which needs K = V.
        norm: a LayerNorm over the network's output, before the residual.
        bias: every matrix has one more input, which is 1.
        norm_eps: added to the variance.
    """

    residual: bool = True
    norm: bool = True
    bias: bool = False
    norm_eps: float = 1e-6
    on_keys: ClassVar[tuple[int, ...]]  # the matrices that multiply keys and queries themselves

    @abstractmethod
    def widths(self, K: int, V: int) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every matrix, without biases."""

    @abstractmethod
    def network(self, apply: Apply, x: Tensor) -> Tensor:
        """x (..., K) -> (..., V), before the norm and the residual; `apply` multiplies by a matrix and its bias."""

    @abstractmethod
    def factors(self, weights: Sequence[Tensor], k: Tensor, pull: Callable[[Tensor], Tensor]) -> list[Factors]:
        """The factors of all matrices for keys (N, C, K); `pull` turns the network's output into its gradient."""

    def shapes(self, K: int, V: int) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every matrix as it is stored, a bias as the last input."""
        return tuple((rows, columns + self.bias) for rows, columns in self.widths(K, V))

    def seen(self, x: Tensor) -> Tensor:
        """What a matrix sees of x: x, and a 1 behind it where there is a bias."""
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.bias else x

    def without_bias(self, weight: Tensor) -> Tensor:
        """The part of a matrix that multiplies its input."""
        return weight[..., :-1] if self.bias else weight

    def output(self, o: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """M(x) from the network's output o."""
        if self.norm:  # written out: layer_norm is less exact where a variance is small, and wrong in third derivatives
            o = self._standardised(o)[0]
        return self._behind_norm(o, x, norm)

    def pulled(self, o: Tensor, x: Tensor, norm: Norm, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss's gradient by the network's output o, from `gradient`, the one by M(x)."""
        if not self.norm:
            return gradient(self._behind_norm(o, x, norm))
        o, scale = self._standardised(o)
        d = gradient(self._behind_norm(o, x, norm))
        d = d if norm.gain is None else d * norm.gain
        return (d - d.mean(-1, keepdim=True) - o * (d * o).mean(-1, keepdim=True)) * scale

    def __call__(self, weights: Sequence[Tensor], x: Tensor, norm: Norm) -> Tensor:
        """M(x; W) of one token a row: weights (..., out, in), x (..., K) -> (..., V)."""
        o = self.network(lambda l, z: (weights[l] @ z.unsqueeze(-1)).squeeze(-1), x)
        return self.output(o, x, norm)

    def _standardised(self, o: Tensor) -> tuple[Tensor, Tensor]:
        """o with mean 0 and variance 1, and what it was multiplied by."""
        o = o - o.mean(-1, keepdim=True)
        scale = (o.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        return o * scale, scale

    def _behind_norm(self, o: Tensor, x: Tensor, norm: Norm) -> Tensor:
        """Gain, offset and the residual, each where there is one."""
        o = o if norm.gain is None else o * norm.gain
        o = o if norm.offset is None else o + norm.offset
        return x + o if self.residual else o


@dataclass(frozen=True, kw_only=True)
class MatrixMemory(Memory):
    """M(x) = W x, with the residual, norm and bias that are asked for; TTT-Linear has all three."""

    on_keys = (0,)

    def widths(self, K: int, V: int) -> tuple[tuple[int, int], ...]:
        """One matrix, V x K."""
        return ((V, K),)

    def network(self, apply: Apply, x: Tensor) -> Tensor:
        """Nothing but one product."""
        return apply(0, self.seen(x))

    def factors(self, weights: Sequence[Tensor], k: Tensor, pull: Callable[[Tensor], Tensor]) -> list[Factors]:
        """The gradient itself, and the key."""
        h = self.seen(k)
        return [Factors(pull(h @ weights[0].mT), h)]


@dataclass(frozen=True, kw_only=True)
class MLPMemory(Memory):
    """M(x) = W_0 gelu(W_1 x): two layers, the inner one `expansion` V wide.

    The matrices are in the order of their distance from the output.
    """

    expansion: float = 4.0
    on_keys = (1,)

    def widths(self, K: int, V: int) -> tuple[tuple[int, int], ...]:
        """Outer and inner matrix, V x E and E x K."""
        inner = max(1, round(self.expansion * V))
        return (V, inner), (inner, K)

    def network(self, apply: Apply, x: Tensor) -> Tensor:
        """Two products with gelu between them."""
        return apply(0, self.seen(F.gelu(apply(1, self.seen(x)))))

    def factors(self, weights: Sequence[Tensor], k: Tensor, pull: Callable[[Tensor], Tensor]) -> list[Factors]:
        """Gradients behind the outer matrix and at the inner layer."""
        outer, inner = weights
        x = self.seen(k)
        z = x @ inner.mT
        h = self.seen(F.gelu(z))
        e = pull(h @ outer.mT)
        return [Factors(e, h), Factors(torch.ops.aten.gelu_backward(e @ self.without_bias(outer), z), x)]


@dataclass(frozen=True, kw_only=True)
class GatedMLPMemory(Memory):
    """M(x) = W_0 (silu(W_1 x) * (W_2 x)): SwiGLU, the inner layer `expansion` V wide."""

    expansion: float = 1.0
    on_keys = (1, 2)

    def widths(self, K: int, V: int) -> tuple[tuple[int, int], ...]:
        """Outer, gate's and inner matrix, V x E, E x K and E x K."""
        inner = max(1, round(self.expansion * V))
        return (V, inner), (inner, K), (inner, K)

    def network(self, apply: Apply, x: Tensor) -> Tensor:
        """Three products, as SwiGLU has them."""
        x = self.seen(x)
        return apply(0, self.seen(F.silu(apply(1, x)) * apply(2, x)))

    def factors(self, weights: Sequence[Tensor], k: Tensor, pull: Callable[[Tensor], Tensor]) -> list[Factors]:
        """Gradients behind the outer matrix, at the gate, and at what it scales."""
        outer, gate, up = weights
        x = self.seen(k)
        a, b = x @ gate.mT, x @ up.mT
        opening = a.sigmoid()
        s = a * opening  # silu
        h = self.seen(s * b)
        e = pull(h @ outer.mT)
        d = e @ self.without_bias(outer)
        return [Factors(e, h), Factors(d * b * (opening + s * (1 - opening)), x), Factors(d * s, x)]
