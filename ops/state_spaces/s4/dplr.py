"""Diagonal plus low rank: A = diag(A) - P P^*, discretised by the bilinear rule, and its kernel by Cauchy sums.

A conjugate pair x, x* of states is two real numbers, and so P P^* over all pairs is one real product of rank one:
x -> P * 2 Re(P^* x). The discrete transition is a real matrix of 2N rows, which the kernel needs for its power of L.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.convolutions.fft_convolution.fourier import fast_length
from zoo.ops.core.algebra import Matrix
from zoo.ops.core.pairs import as_complex, as_pairs

NODES = 1 << 22  # numbers (H, N, nodes) of a Cauchy sum that exist at once: 32 MiB of complex64


class Dplr:
    """x' = (diag(A) - P P^*) x + B u, y = 2 Re sum_n C x; parameters (H, N, 2) and dt (H,).

    Parameters are turned into kernels and transitions in float64, since C (I - A^L) is a difference of almost equal
    numbers when L steps are short; what meets the data is rounded to `dtype` before.
    """

    def __init__(self, A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, dtype: torch.dtype):
        self.A, self.P, self.B, self.C = (as_complex(x.double()) for x in (A, P, B, C))
        self.dtype, self.dt = dtype, dt.double()
        dt = self.dt
        half = dt.unsqueeze(-1) / 2
        self._half = half
        self._D = 1 / (1 - half * self.A)  # (I - dt/2 diag(A))^-1
        self._DP = self._D * self.P
        self._scale = half / (1 + half * 2 * (self.P.conj() * self._DP).real.sum(-1, keepdim=True))
        self._powers: list[Tensor] = []
        self.B_bar = self._backward(2 * half * self.B)
        # C as a real row, (H, 2N): y = readout . x for states as pairs
        self.readout = torch.stack([2 * self.C.real, -2 * self.C.imag], dim=-1).flatten(-2)

    def _low_rank(self, x: Tensor) -> Tensor:
        """2 Re(P^* x), one number a channel."""
        return 2 * (self.P.conj() * x).real.sum(-1, keepdim=True)

    def _backward(self, x: Tensor) -> Tensor:
        """(I - dt/2 A)^-1 x by Woodbury's formula, (..., H, N) complex."""
        x = self._D * x
        return x - self._DP * (self._scale * self._low_rank(x))

    def _transition(self, x: Tensor) -> Tensor:
        """One discrete step without input."""
        return self._backward(x + self._half * (self.A * x - self.P * self._low_rank(x)))

    def power(self, k: int) -> Tensor:
        """The transition of 2**k steps as a real matrix, (H, 2N, 2N)."""
        if not self._powers:
            H, N = self.A.shape
            eye = torch.eye(2 * N, dtype=torch.float64, device=self.dt.device)
            columns = self._transition(as_complex(eye.view(2 * N, 1, N, 2)).expand(-1, H, -1))  # (2N, H, N)
            self._powers.append(as_pairs(columns).flatten(-2).permute(1, 2, 0))
        while len(self._powers) <= k:
            self._powers.append(self._powers[-1] @ self._powers[-1])
        return self._powers[k]

    def matrix(self, length: int) -> Tensor:
        """The transition of `length` steps, (H, 2N, 2N)."""
        bits = [k for k in range(length.bit_length()) if length >> k & 1]
        if not bits:
            return torch.eye(2 * self.A.shape[1], dtype=torch.float64, device=self.dt.device).expand_as(self.power(0))
        M = self.power(bits[0])
        for k in bits[1:]:
            M = M @ self.power(k)
        return M

    def kernel(self, length: int) -> Tensor:
        """The system's impulse response, (H, length), in the dtype of the data."""
        L = fast_length(length)
        c = self.readout.unsqueeze(-2)
        for k in range(L.bit_length()):
            if L >> k & 1:
                c = c @ self.power(k)
        c = (self.readout - c.squeeze(-2)).unflatten(-1, (-1, 2))  # that of C (I - A^L): the sum ends at L
        C = torch.complex(c[..., 0], -c[..., 1]) / 2
        return cauchy_kernel(self.A, self.P, self.B, C, self.dt, L)[:, :length].to(self.dtype)

    def free(self, x: Tensor, length: int) -> Tensor:
        """The outputs (n, length, H) that the states x (n, H, N, 2) cause when no input follows."""
        k = length.bit_length() // 2
        rows = self.readout.unsqueeze(-2) @ self.power(0)  # (H, 1, 2N)
        for i in range(k):
            rows = torch.cat([rows, rows @ self.power(i)], dim=1)  # C A, C A^2, ... C A^(2^k)
        state, states = x.flatten(-2).transpose(0, 1), []  # (H, n, 2N)
        pieces = -(-length // (1 << k))
        for i in range(pieces):
            states.append(state)
            if i + 1 < pieces:
                state = state @ self.power(k).mT.to(self.dtype)
        y = torch.stack(states, dim=2) @ rows.to(self.dtype).unsqueeze(1).mT  # (H, n, pieces, 2^k)
        return y.flatten(2)[..., :length].permute(1, 2, 0)

    def forced(self, u: Tensor) -> Tensor:
        """The states (n, H, N, 2) that the inputs u (n, L, H) leave behind, from zero states."""
        n, L, H = u.shape
        k = L.bit_length() // 2
        pieces = 1 << (-(-L // (1 << k)) - 1).bit_length()  # a power of two, filled up in front
        u = torch.cat([u.new_zeros(n, (pieces << k) - L, H), u], dim=1)
        columns = as_pairs(self.B_bar).flatten(-2).unsqueeze(-2)  # (H, 1, 2N): B, then A B, ... as rows
        for i in range(k):
            columns = torch.cat([columns, columns @ self.power(i).mT], dim=1)
        rows = u.view(n, pieces, 1 << k, H).permute(3, 0, 1, 2).flip(-1).flatten(1, 2)  # (H, n * pieces, 2^k)
        x = (rows @ columns.to(self.dtype)).unflatten(1, (n, pieces))  # (H, n, pieces, 2N)
        while x.shape[2] > 1:
            x = x[:, :, 0::2] @ self.power(k).mT.to(self.dtype).unsqueeze(1) + x[:, :, 1::2]
            k += 1
        state: Tensor = x[:, :, 0].transpose(0, 1).unflatten(-1, (-1, 2))
        return state

    def advance(self, x: Tensor, lengths: Tensor, most: int) -> Tensor:
        """The states (n, H, N, 2) after `lengths` (n,) steps without input, of which none is over `most`."""
        state = x.flatten(-2).unsqueeze(-1)  # (n, H, 2N, 1)
        for k in range(most.bit_length()):
            on = (lengths >> k & 1).bool().view(-1, 1, 1, 1)
            state = torch.where(on, self.power(k).to(self.dtype) @ state, state)
        pairs: Tensor = state.squeeze(-1).unflatten(-1, (-1, 2))
        return pairs

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One step with the input u (n, H): the outputs (n, H) and the states (n, H, N, 2) after it."""
        after = self._transition(as_complex(x.double())) + self.B_bar * u.unsqueeze(-1)
        return 2 * (self.C * after).real.sum(-1).to(self.dtype), as_pairs(after).to(self.dtype)

    def element(self, u: Tensor) -> Matrix:
        """On states (n, H, 2N, 1)."""
        M = self.matrix(u.shape[1]).to(self.dtype)
        b = self.forced(u).flatten(-2) if u.shape[1] else M.new_zeros(len(u), *M.shape[:2])
        return Matrix(M, b.unsqueeze(-1))


def cauchy_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """The first `length` numbers of the kernel, where C stands for C (I - A^length); (H, N) complex, dt (H,).

    At the root of unity w = exp(-2 i t) the generating function is

        2 / (1 + w) [k(C, B) - k(C, P) k(P*, B) / (1 + k(P*, P))],    k(a, b) = sum_n a_n b_n / (z - A_n),

    with z = (2 / dt) (1 - w) / (1 + w) = (2 i / dt) tan t, over all states, conjugates included. z and the first factor
    are infinite at w = -1, where the product is not. With k = cos(t) s, where
    s(a, b) = sum_n a_n b_n / ((2 i / dt) sin t - A_n cos t), the same is

        exp(i t) [s(C, B) - cos(t) s(C, P) s(P*, B) / (1 + cos(t) s(P*, P))]

    and nothing is singular anywhere. A conjugate pair has the real denominator's coefficients, and so the four sums are
    one matrix product with real weights over the nodes.
    """
    weights = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=1)  # (H, 4, N)
    v = 2 * torch.cat([weights.real, -(weights * A.conj().unsqueeze(1)).real], dim=1)  # (H, 8, N)
    t = torch.arange(length // 2 + 1, dtype=torch.float64, device=dt.device) * (math.pi / length)
    size = max(1, NODES // max(1, A.numel()))
    parts = []
    for part in t.split(size):
        if len(t) > size and torch.is_grad_enabled():
            parts.append(checkpoint(_cauchy, A, v, dt, part, use_reentrant=False))
        else:
            parts.append(_cauchy(A, v, dt, part))
    kernel: Tensor = torch.fft.irfft(torch.cat(parts, dim=-1), length, dim=-1)
    return kernel


def _cauchy(A: Tensor, v: Tensor, dt: Tensor, t: Tensor) -> Tensor:
    """The generating function at the nodes t, (H, nodes) complex."""
    sin, cos = t.sin().to(dt.dtype), t.cos().to(dt.dtype)
    turn = torch.complex(cos, sin)
    g = 2 * sin / dt.unsqueeze(-1)  # (H, nodes)
    size, real = A.abs().unsqueeze(-1) * cos, A.real.unsqueeze(-1) * cos  # (H, N, nodes)
    re, im = (size - g.unsqueeze(1)) * (size + g.unsqueeze(1)), 2 * g.unsqueeze(1) * real
    norm = re.square() + im.square()  # 1 / (re - i im) = (re + i im) / norm
    sums = torch.complex(v @ (re / norm), v @ (im / norm))  # (H, 8, nodes)
    s = sums[:, 4:] * cos + sums[:, :4] * (1j * g).unsqueeze(1)
    return turn * (s[:, 0] - cos * s[:, 1] * s[:, 2] / (1 + cos * s[:, 3]))
