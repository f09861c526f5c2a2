"""The definition: a loop from each end."""

import itertools

import torch
from torch import Tensor


def bidirectional_gla_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cuts: tuple[int, ...] | None
) -> Tensor:
    """o (B, T, H, V), every document by itself; all arguments in one float dtype."""
    outputs = []
    for begin, end in itertools.pairwise(cuts or (0, q.shape[1])):
        steps = range(begin, end)
        if begin < end:
            left = _read(q, k, v, g[:, :, 0], steps, scale)
            right = _read(q, k, v, g[:, :, 1], steps[::-1], scale)
            outputs.append(torch.stack([(left[t] + right[t]) / 2 for t in steps], dim=1))
    return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(v)


def _read(q: Tensor, k: Tensor, v: Tensor, g: Tensor, steps: range, scale: float) -> dict[int, Tensor]:
    """{t: S^T (scale q_t)} of a memory that sees the tokens in the order of `steps`."""
    S, read = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), {}
    q_, k_, v_, g_ = (x.unbind(1) for x in (q, k, v, g))
    for t in steps:
        S = g_[t].exp().unsqueeze(-1) * S + k_[t].unsqueeze(-1) * v_[t].unsqueeze(-2)
        read[t] = torch.einsum("bhkv,bhk->bhv", S, scale * q_[t])
    return read
