"""Depthwise convolution that sees both sides: the short convolution of bidirectional mixers."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import shard
from zoo.ops.convolutions.causal_conv1d import ACTIVATIONS, causal_conv1d
from zoo.ops.convolutions.depthwise_conv1d.reference import depthwise_conv1d_reference
from zoo.ops.core.call import Operator

__all__ = ["depthwise_conv1d"]


OPERATOR = Operator("depthwise_conv1d", cp_kind="halo")


@OPERATOR.public(recomputed=True)
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own W taps around it: y_t = act(bias + sum_w weight[:, w] * x_{t - (W-1)//2 + w}).

    Args:
        x: input, (B, T, D), any float dtype; zeros beyond both ends.
        weight: taps, (D, W), W >= 1; the present token is tap (W-1)//2, as torch's padding="same" has it.
        bias: (D,), or None.
        activation: None or "silu", applied to the sum.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; taps never cross a border.
        backend: "auto" (Triton on CUDA, else torch), "triton", "torch" or "reference".

    Returns:
        y: (B, T, D), in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown activation, or the backend cannot run here.

    Cost: that of `causal_conv1d`, which does the work on an input shifted by W // 2: what it takes for the past of a
    document is the document's own beginning. Across ranks (W - 1) // 2 rows come from the left, W // 2 from the right.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"depthwise_conv1d: activation must be None or 'silu'; got {activation!r}")
    args = {"x": (x, "B T D"), "weight": (weight, "D W"), "bias": (bias, "D")}
    call = OPERATOR.begin(args, alike=("x", "weight", "bias"), cu_seqlens=cu_seqlens, backend=backend)
    cuts, W = call.cuts, weight.shape[1]
    if call.backend == "reference" and shard.current() is None:
        documents = [x] if cuts is None else [x[:, left:right] for left, right in itertools.pairwise(cuts)]
        outputs = [depthwise_conv1d_reference(z, weight, bias, activation) for z in documents if z.shape[1]]
        return torch.cat(outputs, dim=1)
    around = shard.rows_before(x, (W - 1) // 2, cuts), shard.rows_after(x, W // 2, cuts)
    past, shifted = _batch(x, *around) if cuts is None else _packed(x, *around, cuts)
    with shard.unsharded():
        y, _ = causal_conv1d(shifted, weight, bias, past, activation=activation, cu_seqlens=cu_seqlens, backend=backend)
    return y


def _batch(x: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The W - 1 rows before the first shifted input, and the shifted inputs."""
    width = before.shape[1] + after.shape[1]
    past, shifted = torch.cat([before, x, after], dim=1).split([width, x.shape[1]], dim=1)
    return past, shifted


def _packed(x: Tensor, before: Tensor, after: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same of every document: rows by number, first those of x, then those before and after, then one of zeros."""
    T, left_of, right_of = x.shape[1], before.shape[1], after.shape[1]
    zeros = T + left_of + right_of

    rows: list[int] = []
    pasts: list[list[int]] = []
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        earlier = range(T, T + left_of) if i == 0 else [zeros] * left_of
        later = range(T + left_of, zeros) if i == len(cuts) - 2 else [zeros] * right_of
        around = [*earlier, *range(left, right), *later]
        pasts.append(around[: left_of + right_of])
        rows += around[left_of + right_of :]
    padded = F.pad(torch.cat([x, before, after], dim=1)[0], (0, 0, 0, 1))
    past = padded[torch.tensor(pasts, dtype=torch.long, device=x.device)]
    return past, padded[torch.tensor(rows, dtype=torch.long, device=x.device)][None]
