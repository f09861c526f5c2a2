"""Quasiseparable mixing (Hydra): two state space scans, one from each end, and a diagonal of its own."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import check, dispatch, shard
from zoo.ops.once import runs_once
from zoo.ops.quasiseparable.reference import quasiseparable_reference
from zoo.ops.ssd import ssd

DIRECTIONS = 2


@runs_once
@dispatch.keeps_its_precision
def quasiseparable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix time by y_i = sum_{j<i} C_{i-1} . S_{ij} x_j + D_i x_i + sum_{j>i} C_{i+1} . S_{ij} x_j, head by head.

    S_{ij} = dt_j B_j times the decays exp(dt_m A) of the steps strictly between j and i, with the dt, B, C of the
    direction: the state of `ssd` before token i, from the left and from the right, is read by the neighbour's C. A
    token's own dt, B and C never reach its own output; D alone does.

    Args:
        x: input, (B, T, H, P), any float dtype, shared by x, B and C.
        dt: step sizes of both directions, (B, T, 2, H), >= 0 (not checked); first the one from the left.
        A: rate of each head, (H,), <= 0 (not checked), for both directions.
        B, C: what writes to and reads from the memories, (B, T, 2, G, N); H / G neighbouring heads share a group.
        D: weight of each token on its own output, (B, T, H), or None for a zero diagonal.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; nothing crosses a border in either direction.
        backend: "auto", "triton" or "torch", of `ssd`, or "reference": the explicit matrix, T^2 numbers a head.

    Returns:
        y: (B, T, H, P), in the dtype of x. There is no state: the outputs need both ends.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend cannot run here, or time is cut across ranks.

    Cost: twice that of `ssd`.
    Source: arXiv 2407.09941, section 3 (proposition 3.7); the indices are the official code's.
    """
    name = "quasiseparable"
    sizes = check.shapes(
        name,
        {
            "x": (x, "B T H P"), "dt": (dt, "B T 2 H"), "A": (A, "H"), "B": (B, "B T 2 G N"), "C": (C, "B T 2 G N"),
            "D": (D, "B T H"),
        },
        **{"2": DIRECTIONS},
    )  # fmt: skip
    check.same_dtype(name, x=x, B=B, C=C)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{name}: the number of heads must be a multiple of the groups of B and C; "
            f"got H = {sizes['H']}, G = {sizes['G']}"
        )
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"{name}: backend must be one of {', '.join(dispatch.BACKENDS)}; got {backend!r}")
    shard.refuse("Quasiseparable mixing")
    if sizes["T"] == 0:
        return torch.zeros_like(x)
    if backend == "reference":
        return _reference(x, dt, A, B, C, D, cuts)
    return _two_scans(x, dt, A, B, C, D, cuts, backend)


def _reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cuts: tuple[int, ...] | None
) -> Tensor:
    wide = dispatch.state_dtype(x)
    D = x.new_zeros(x.shape[:3]) if D is None else D
    A, timed, outputs = A.to(wide), [z.to(wide) for z in (x, dt, B, C, D)], []
    for left, right in itertools.pairwise(cuts or (0, x.shape[1])):
        if left < right:
            u, step, write, read, own = (z[:, left:right] for z in timed)
            outputs.append(quasiseparable_reference(u, step, A, write, read, own))
    return torch.cat(outputs, dim=1).to(x.dtype)


def _two_scans(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cuts: tuple[int, ...] | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """Both directions as one call of `ssd`: side by side in the batch, or one after the other as packed documents."""
    T = x.shape[1]
    side = 0 if cuts is None else 1
    both = None
    if cuts is not None:  # on the CPU: only the host reads boundaries, and it has just read these
        both = torch.tensor([*cuts, *(2 * T - cut for cut in reversed(cuts[:-1]))])
    x2, dt2, B2, C2 = (
        torch.cat([left, right.flip(1)], dim=side)
        for left, right in ((x, x), *((z[:, :, 0], z[:, :, 1]) for z in (dt, B, C)))
    )
    y = ssd(x2, dt2, A, B2, C2, cu_seqlens=both, backend=backend)[0]
    y = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0))  # token i gets what the state before it says
    if both is not None:
        starts = [cut for cut in both.tolist() if cut < 2 * T]
        y = y.index_fill(1, torch.tensor(starts, device=y.device), 0.0)
    forward, backward = y.chunk(2, dim=side)
    y = forward + backward.flip(1)
    return y if D is None else torch.addcmul(y, D.to(y.dtype).unsqueeze(-1), x)
