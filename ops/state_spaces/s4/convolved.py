"""Fast form of every time-invariant system: convolve, and add what the state before shows."""

import torch
from torch import Tensor

from zoo.ops.convolutions.fft_convolution.fourier import convolve
from zoo.ops.core import documents
from zoo.ops.state_spaces.s4.systems import System


def convolved(
    system: System, u: Tensor, state: Tensor | None, D: Tensor | None, n: int, cuts: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs, and the states after (B, H, N, 2) or (n, H, N, 2).

    Args:
        system: kernels and responses, computed in `dtype`.
        u: (B, T, H); state: None for zeros, which cost nothing; D: (H,).
        n: rows of the state; cuts: borders of packed documents.
    """
    wide = u.to(dtype)
    T = u.shape[1]
    if cuts is None:
        if T == 1 and state is not None:
            y, last = system.step(state, wide[:, 0])
            y = y.unsqueeze(1)
        else:
            y, last = _rows(system, system.kernel(T), wide, state, torch.full((1,), T, device=u.device))
    else:
        made = documents.groups(cuts, u.device)
        K = system.kernel(max(group.places.shape[1] for group in made))
        outputs, indices, ends = [], [], []
        for group in made:
            rows = documents.gather(wide, group)
            before = None if state is None else state[group.documents]
            y, end = _rows(system, K, rows, before, group.lengths)
            outputs.append(y)
            indices.append(group.documents)
            ends.append(end)
        y, finals = documents.scatter(outputs, made, T), torch.cat(ends)
        before_all = finals.new_zeros(n, *finals.shape[1:]) if state is None else state
        last = before_all.index_copy(0, torch.cat(indices), finals)
    y = y if D is None else torch.addcmul(y, D.to(dtype), wide)
    return y.to(u.dtype), last


def _rows(
    system: System, K: Tensor, u: Tensor, state: Tensor | None, lengths: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows u (n, L, H) that end at the right edge, zeros before they begin."""
    L = u.shape[1]
    y, last = convolve(u, K), system.forced(u)
    if state is None:
        return y, last
    shown = system.free(state, L)  # as if every row began at the left edge
    if len(lengths) > 1:
        place = torch.arange(L, device=u.device) - (L - lengths.unsqueeze(1))  # (n, L)
        shown = shown.gather(1, place.clamp_min(0).unsqueeze(-1).expand_as(shown))
        shown = shown.masked_fill((place < 0).unsqueeze(-1), 0)
    return y + shown, last + system.advance(state, lengths, L)
