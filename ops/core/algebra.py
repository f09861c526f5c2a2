"""What a stretch of time does to any state, as a small value: elements of a monoid that compose in the order of time.

Every kind has `first.then(second)` (associative, with `identity`) and `apply(state)`, so that a stretch may be cut,
computed anywhere and put together again: chunks, ranks and cached prefixes are all this one algebra. The affine kinds,
state -> A state + b, also know `transposed(b)`, the map through which gradients return; `reset_to(value)`: a border of
documents lies inside the stretch, so that whatever arrives ends there and `value` leaves; and `columns(n)`: the element
in n parts along `axis` of the state, each of which acts on its part alone, so that a state may travel in blocks.
"""

import functools
from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from zoo.ops.core.pairs import as_complex, as_pairs


class Element(Protocol):
    """What all kinds share. `then` takes an element of the same kind."""

    def then(self, second: Self, /) -> Self:
        """The element of this stretch followed in time by `second`."""
        ...


E = TypeVar("E", bound=Element)
S = TypeVar("S")


def compose(first: E, second: E) -> E:
    """The element of `first` followed in time by `second`."""
    return first.then(second)


def fold(elements: Iterable[E]) -> E:
    """The element of a whole stretch from those of its pieces, oldest first; at least one."""
    return functools.reduce(compose, elements)


class Elementwise(NamedTuple):
    """h -> a * h + b, all of the state's shape (or broadcast to it)."""

    a: Tensor
    b: Tensor

    @classmethod
    def identity(cls, state: Tensor) -> "Elementwise":
        """The element that changes no state of this shape: a = 1, b = 0."""
        return cls(torch.ones_like(state), torch.zeros_like(state))

    def then(self, second: "Elementwise", /) -> "Elementwise":
        """The element of both stretches: a2 a1 and a2 b1 + b2."""
        return Elementwise(second.a * self.a, second.apply(self.b))

    def apply(self, state: Tensor) -> Tensor:
        """The state after the stretch, a * state + b."""
        return self.a * state + self.b

    def transposed(self, b: Tensor) -> "Elementwise":
        """The map of gradients against time, with `b` added: d -> a * d + b."""
        return Elementwise(self.a, b)

    def reset_to(self, value: Tensor) -> "Elementwise":
        """The element that forgets any state and leaves `value`, of b's shape."""
        return Elementwise(torch.zeros_like(self.a), value)

    @property
    def axis(self) -> int:
        """The dimension of the state along which `columns` cuts: the last."""
        return -1

    def columns(self, n: int) -> list["Elementwise"]:
        """The element in `n` parts along the last dimension, each for its part of the state."""
        a = self.a.expand(self.b.shape)
        return [Elementwise(*part) for part in zip(a.tensor_split(n, -1), self.b.tensor_split(n, -1), strict=True)]


class Diagonal(NamedTuple):
    """S -> diag(exp(log_a)) S + b on matrices: log_a (..., K), b (..., K, V).

    The decay stays a logarithm until it is used: long stretches add, and -inf forgets everything.
    """

    log_a: Tensor
    b: Tensor

    @classmethod
    def identity(cls, state: Tensor) -> "Diagonal":
        """The element that changes no state of this shape: log_a = 0, b = 0."""
        return cls(torch.zeros_like(state[..., 0]), torch.zeros_like(state))

    def then(self, second: "Diagonal", /) -> "Diagonal":
        """The element of both stretches: logarithms of decays add."""
        return Diagonal(self.log_a + second.log_a, second.apply(self.b))

    def apply(self, state: Tensor) -> Tensor:
        """The state (..., K, V) after the stretch, exp(log_a) * state + b."""
        return torch.addcmul(self.b, self.log_a.exp().unsqueeze(-1), state)

    def transposed(self, b: Tensor) -> "Diagonal":
        """The map of gradients against time, with `b` added; a diagonal is its own transpose."""
        return Diagonal(self.log_a, b)

    def reset_to(self, value: Tensor) -> "Diagonal":
        """The element that forgets any state (log_a = -inf) and leaves `value` (..., K, V)."""
        return Diagonal(torch.full_like(self.log_a, float("-inf")), value)

    @property
    def axis(self) -> int:
        """The dimension of the state along which `columns` cuts: V, the last."""
        return -1

    def columns(self, n: int) -> list["Diagonal"]:
        """The element in `n` parts along V, each for its columns of the state."""
        return [Diagonal(self.log_a, b) for b in self.b.tensor_split(n, -1)]


class Matrix(NamedTuple):
    """S -> M S + b on matrices: M (..., K, K), b (..., K, V)."""

    M: Tensor
    b: Tensor

    @classmethod
    def identity(cls, state: Tensor) -> "Matrix":
        """The element that changes no state (..., K, V): M = 1, b = 0."""
        K = state.shape[-2]
        eye = torch.eye(K, dtype=state.dtype, device=state.device)
        return cls(eye.expand(*state.shape[:-1], K), torch.zeros_like(state))

    def then(self, second: "Matrix", /) -> "Matrix":
        """The element of both stretches: M2 M1 and M2 b1 + b2."""
        return Matrix(second.M @ self.M, second.apply(self.b))

    def apply(self, state: Tensor) -> Tensor:
        """The state (..., K, V) after the stretch, M state + b."""
        return self.M @ state + self.b

    def transposed(self, b: Tensor) -> "Matrix":
        """The map of gradients against time, with `b` added: d -> M^T d + b."""
        return Matrix(self.M.mT, b)

    def reset_to(self, value: Tensor) -> "Matrix":
        """The element that forgets any state (M = 0) and leaves `value` (..., K, V)."""
        return Matrix(torch.zeros_like(self.M), value)

    @property
    def axis(self) -> int:
        """The dimension of the state along which `columns` cuts: V, the last."""
        return -1

    def columns(self, n: int) -> list["Matrix"]:
        """The element in `n` parts along V, each for its columns of the state."""
        return [Matrix(self.M, b) for b in self.b.tensor_split(n, -1)]


class Block2x2(NamedTuple):
    """h -> A h + b with a 2x2 block per channel: A (..., 2, 2), b and h (..., 2)."""

    A: Tensor
    b: Tensor

    @classmethod
    def identity(cls, state: Tensor) -> "Block2x2":
        """The element that changes no state (..., 2): A = 1, b = 0."""
        eye = torch.eye(2, dtype=state.dtype, device=state.device)
        return cls(eye.expand(*state.shape, 2), torch.zeros_like(state))

    def then(self, second: "Block2x2", /) -> "Block2x2":
        """The element of both stretches: A2 A1 and A2 b1 + b2."""
        A2, A1 = second.A, self.A
        # written out: batched products of 2x2 matrices are slower than their two terms
        A = A2[..., :, :1] * A1[..., :1, :] + A2[..., :, 1:] * A1[..., 1:, :]
        return Block2x2(A, second.apply(self.b))

    def apply(self, state: Tensor) -> Tensor:
        """The state (..., 2) after the stretch, A state + b."""
        return self.A[..., 0] * state[..., :1] + self.A[..., 1] * state[..., 1:] + self.b

    def transposed(self, b: Tensor) -> "Block2x2":
        """The map of gradients against time, with `b` added: d -> A^T d + b."""
        return Block2x2(self.A.mT, b)

    def reset_to(self, value: Tensor) -> "Block2x2":
        """The element that forgets any state (A = 0) and leaves `value` (..., 2)."""
        return Block2x2(torch.zeros_like(self.A), value)

    @property
    def axis(self) -> int:
        """The dimension of the state along which `columns` cuts: the channels, before the pair."""
        return -2

    def columns(self, n: int) -> list["Block2x2"]:
        """The element in `n` parts along the channels, each for its part of the state."""
        parts = zip(self.A.tensor_split(n, -3), self.b.tensor_split(n, -2), strict=True)
        return [Block2x2(*part) for part in parts]


class ComplexElementwise(NamedTuple):
    """h -> a * h + b with complex numbers as pairs (..., 2) of real ones; a may be broadcast to the state's shape."""

    a: Tensor
    b: Tensor

    @classmethod
    def identity(cls, state: Tensor) -> "ComplexElementwise":
        """The element that changes no state (..., 2): a = 1 + 0i, b = 0."""
        return cls(as_pairs(torch.ones_like(as_complex(state))), torch.zeros_like(state))

    def then(self, second: "ComplexElementwise", /) -> "ComplexElementwise":
        """The element of both stretches: complex products a2 a1 and a2 b1 + b2."""
        return ComplexElementwise(
            as_pairs(as_complex(second.a) * as_complex(self.a)), second.apply(self.b)
        )  # fmt: skip

    def apply(self, state: Tensor) -> Tensor:
        """The state (..., 2) after the stretch, the complex product a * state plus b."""
        return as_pairs(as_complex(self.a) * as_complex(state)) + self.b

    def transposed(self, b: Tensor) -> "ComplexElementwise":
        """The map of gradients against time, with `b` added; it multiplies by the conjugate of a."""
        return ComplexElementwise(torch.stack([self.a[..., 0], -self.a[..., 1]], dim=-1), b)

    def reset_to(self, value: Tensor) -> "ComplexElementwise":
        """The element that forgets any state (a = 0) and leaves `value` (..., 2)."""
        return ComplexElementwise(torch.zeros_like(self.a), value)

    @property
    def axis(self) -> int:
        """The dimension of the state along which `columns` cuts: the one before the pair."""
        return -2

    def columns(self, n: int) -> list["ComplexElementwise"]:
        """The element in `n` parts along the dimension before the pair, each for its part of the state."""
        a = self.a.expand(self.b.shape)
        parts = zip(a.tensor_split(n, -2), self.b.tensor_split(n, -2), strict=True)
        return [ComplexElementwise(*part) for part in parts]


Affine = Elementwise | Diagonal | Matrix | Block2x2 | ComplexElementwise


class LogSumExp(NamedTuple):
    """A softmax-weighted sum in parts: m the largest score, u = sum exp(s - m), w = sum exp(s - m) v.

    m and u (...), w (..., V). A part that saw nothing has m = -inf, u = 0, w = 0. The state is of the same kind.
    """

    m: Tensor
    u: Tensor
    w: Tensor

    @classmethod
    def identity(cls, w: Tensor) -> "LogSumExp":
        """A part that saw nothing: m = -inf, u = 0 and w = 0, where w gives shapes (..., V)."""
        return cls(torch.full_like(w[..., 0], float("-inf")), torch.zeros_like(w[..., 0]), torch.zeros_like(w))

    @classmethod
    def of(cls, output: Tensor, log_sum: Tensor) -> "LogSumExp":
        """From what attention over some of the keys returns: the average (..., V) and its log-sum-exp (...)."""
        seen = log_sum != float("-inf")
        return cls(log_sum, seen.to(output.dtype), output.where(seen.unsqueeze(-1), torch.zeros_like(output)))

    def then(self, second: "LogSumExp", /) -> "LogSumExp":
        """The sum over both parts, rescaled to the larger of their largest scores."""
        m = torch.maximum(self.m, second.m)
        largest = m.masked_fill(m == float("-inf"), 0)  # nothing seen: exp(-inf - 0) = 0, never -inf - -inf
        a, b = (self.m - largest).exp(), (second.m - largest).exp()
        return LogSumExp(m, a * self.u + b * second.u, a.unsqueeze(-1) * self.w + b.unsqueeze(-1) * second.w)

    def apply(self, state: "LogSumExp") -> "LogSumExp":
        """The state, a sum of the same kind, with this part added behind it."""
        return state.then(self)

    def output(self) -> tuple[Tensor, Tensor]:
        """The weighted average (..., V), zeros where nothing was seen, and the log-sum-exp (...) of the scores."""
        seen = self.u > 0
        u = self.u.where(seen, torch.ones_like(self.u))
        return self.w / u.unsqueeze(-1), (self.m + u.log()).masked_fill(~seen, float("-inf"))


class Closed(NamedTuple, Generic[S]):
    """A stretch in which another document begins: whatever arrives ends inside, and `value` leaves.

    For states that join by a rule of their own, as `LogSumExp`. The affine kinds say it by `reset_to`.
    """

    value: S

    def then(self, second: "Closed[S]", /) -> "Closed[S]":
        """Of two such stretches the later one alone decides."""
        return second

    def apply(self, state: S) -> S:
        """The state of the last document, whatever came before."""
        return self.value


class Tail(NamedTuple):
    """The last `width` rows of a stretch, (B, up to width, D): all that a causal convolution hands on."""

    rows: Tensor
    width: int

    @classmethod
    def of(cls, x: Tensor, width: int) -> "Tail":
        """x: (B, T, D)."""
        return cls(x[:, max(0, x.shape[1] - width) :], width)

    @classmethod
    def identity(cls, state: Tensor) -> "Tail":
        """The tail of an empty stretch: no rows, of a width that `state` (B, width, D) gives."""
        return cls(state[:, :0], state.shape[1])

    def then(self, second: "Tail", /) -> "Tail":
        """The last `width` rows of both stretches in a row."""
        if second.rows.shape[1] == second.width:
            return second
        return Tail.of(torch.cat([self.rows, second.rows], dim=1), second.width)

    def apply(self, state: Tensor) -> Tensor:
        """The state (B, width, D) after the stretch: the last rows of the old state and this stretch."""
        return Tail(state, self.width).then(self).rows

    def reset_to(self, value: Tensor) -> "Tail":
        """The tail that forgets any state and leaves `value` (B, width, D)."""
        return Tail(value, self.width)
