"""What the convolutional form needs to know of a linear time-invariant system; the diagonal one."""

from typing import Protocol

import torch
from torch import Tensor

from zoo.ops.core import dispatch
from zoo.ops.core.algebra import ComplexElementwise, Matrix
from zoo.ops.core.pairs import as_complex, as_pairs
from zoo.ops.state_spaces.s4.vandermonde import times, vandermonde, vandermonde_transposed

if dispatch.HAS_TRITON:
    from zoo.ops.state_spaces.s4 import kernels


class System(Protocol):
    """H channels, each with N complex states (..., H, N, 2) that stand for themselves and their conjugates."""

    def kernel(self, length: int) -> Tensor:
        """The response to an impulse, (H, length)."""

    def free(self, x: Tensor, length: int) -> Tensor:
        """What states x (n, H, N, 2) show in the steps that follow, without inputs: (n, length, H)."""

    def forced(self, u: Tensor) -> Tensor:
        """The states after inputs u (n, L, H) that found zeros, (n, H, N, 2)."""

    def advance(self, x: Tensor, lengths: Tensor, most: int) -> Tensor:
        """The states x (n, H, N, 2) after `lengths` (n,) steps, none more than `most`, without inputs."""

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One input u (n, H): what is shown, (n, H), and the states after."""

    def element(self, u: Tensor) -> ComplexElementwise | Matrix:
        """What the inputs u (n, L, H) do to any state."""


class Diagonal:
    """x_t = exp(log_A) x_{t-1} + B u_t, y_t = 2 Re sum_n C x_t; parameters (H, N, 2) in float32 or float64."""

    def __init__(self, log_A: Tensor, B: Tensor, C: Tensor, chosen: str):
        self.log_A, self.B, self.C = log_A, as_complex(B), as_complex(C)
        self.A = as_complex(log_A).exp()
        self.triton = chosen == "triton"

    def _vandermonde(self, w: Tensor, length: int) -> Tensor:
        if self.triton:
            sums: Tensor = kernels.vandermonde_fwd(self.log_A, as_pairs(w), length)
            return sums
        return vandermonde(self.log_A, as_pairs(w), length)

    def kernel(self, length: int) -> Tensor:
        """The system's impulse response, (H, length)."""
        return self._vandermonde((self.B * self.C).unsqueeze(0), length).squeeze(0)

    def free(self, x: Tensor, length: int) -> Tensor:
        """The outputs (n, length, H) that the states x (n, H, N, 2) cause when no input follows."""
        return self._vandermonde(self.C * self.A * as_complex(x), length).mT

    def forced(self, u: Tensor) -> Tensor:
        """The states (n, H, N, 2) that the inputs u (n, L, H) leave behind, from zero states."""
        return as_pairs(self.B * as_complex(vandermonde_transposed(self.log_A, u).contiguous()))

    def advance(self, x: Tensor, lengths: Tensor, most: int) -> Tensor:
        """The states (n, H, N, 2) after `lengths` (n,) steps without input."""
        return as_pairs(self._after(lengths) * as_complex(x))

    def _after(self, lengths: Tensor) -> Tensor:
        """exp(lengths * log_A), (n, H, N)."""
        n = lengths.view(-1, 1, 1, 1).double()
        turned = torch.remainder(self.log_A[..., 1:].double() * n, 2 * torch.pi).to(self.log_A.dtype)
        return torch.exp(as_complex(torch.cat([self.log_A[..., :1] * n.to(self.log_A.dtype), turned], dim=-1)))

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One step with the input u (n, H): the outputs (n, H) and the states (n, H, N, 2) after it."""
        after = self.A * as_complex(x) + self.B * u.unsqueeze(-1)
        return 2 * (self.C * after).real.sum(-1), as_pairs(after)

    def element(self, u: Tensor) -> ComplexElementwise:
        """What the stretch of inputs u (n, L, H) does to any state; the identity where L is 0."""
        a = torch.exp(as_complex(times(self.log_A, u.shape[1])))
        return ComplexElementwise(
            as_pairs(a), self.forced(u) if u.shape[1] else as_pairs(0 * a).expand(len(u), *a.shape, 2)
        )
