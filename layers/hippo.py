"""Where structured state spaces start: HiPPO-LegS as a diagonal plus a low rank, and its simpler kin."""

import math

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors

INITS = ("legs", "lin", "inv", "real")


@cached_tensors(maxsize=None)
def legs(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO-LegS of N states (even) as V (diag(A) - P P^*) V^*, one of each conjugate pair, in complex128 on the CPU.

    Returns:
        A, P, B (N / 2,) by rising frequency, and V (N, N / 2). A = -1/2 + i w.

    Source: arXiv 2111.00396, theorem 1 and appendix C.
    """
    if N < 2 or N % 2:
        raise ValueError(f"a state of conjugate pairs has an even size of at least 2; got {N}")
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    B, P = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    lower = torch.tril(B[:, None] * B, -1)
    skew = (lower.T - lower) / 2  # A + P P^T + 1/2 is skew, so that -i times it is Hermitian
    w, V = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    w, V = w[N // 2 :], V[:, N // 2 :]
    A = torch.complex(torch.full_like(w, -0.5), w)
    return A, V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V


def diagonal(init: str, N: int) -> tuple[Tensor, Tensor]:
    """A and B (N / 2,) of a diagonal state space, complex128 on the CPU; `init` is one of INITS.

    Source: arXiv 2206.11893, section 4.
    """
    if init == "legs":
        A, _, B, _ = legs(N)
        return A, B
    n = torch.arange(N // 2, dtype=torch.float64, device="cpu")
    if init == "real":
        A = torch.complex(-(n + 1), torch.zeros_like(n))
    else:
        A = torch.complex(
            torch.full_like(n, -0.5), math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
        )
    return A, torch.ones_like(A)
