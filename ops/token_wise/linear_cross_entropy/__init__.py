"""Cross entropy fused with the output head: the logits of all tokens never exist at once."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.call import Operator
from zoo.ops.token_wise.linear_cross_entropy.chunked import TORCH_STEP, reduced_loss, token_losses
from zoo.ops.token_wise.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy"]

if dispatch.HAS_TRITON:
    from zoo.ops.token_wise.linear_cross_entropy.kernels import TRITON_STEP

REDUCTIONS = ("mean", "sum", "none")

OPERATOR = Operator("linear_cross_entropy", cp_kind="local", float64=True)


@OPERATOR.public(recomputed=True, precise=False)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the logits z = x weight^T + bias: loss_t = logsumexp(z_t) - z_t[targets_t].

    Args:
        x: hidden vectors, (B, T, D), any float dtype.
        weight: the head's matrix, (V, D); may be the embedding's. Frozen or under no_grad it costs no gradient.
        targets: (B, T) int64 or int32 in [0, V), or ignore_index where a token is not scored.
        bias: (V,), or None.
        ignore_index: the target of tokens without a loss; their x, whatever it holds, gets a zero gradient.
        reduction: "mean" over the scored tokens (NaN when there is none), "sum", or "none": every token's loss, zeros
            where not scored. When time or the batch is cut across processes, take "sum" and divide by the count of all.
        backend: "auto" (Triton on CUDA, else torch), "triton", "torch" or "reference".

    Returns:
        The loss, () or (B, T), in float32, float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown reduction, "mean" of one slice of a sequence that is
            cut across ranks, or on a CPU a target that is no token (on other devices its loss is NaN).
        RuntimeError: a second backward pass after one without retain_graph=True (by "mean" and "sum").

    Under autocast the products run in its dtype, as those of torch's linear do (on a CPU in float32 all the same, which
    is faster there); gradients keep their tensors' dtypes.

    Cost: "mean" and "sum" make the gradients in the forward pass, 6 B T V D operations in all, as many as the plain
    path; "none" makes the logits once more in the backward pass. Memory beyond the gradients: one chunk of logits (see
    `chunked.py`), and V D numbers where products are in half precision, for gradients are summed in float32.
    Source: the chunked loss of Liger-Kernel (arXiv 2410.10989). torch 2.13 has one of its own: on a CPU it took 2.0
    times the plain path's time, and this way of doing it 0.89 (B T = 4096, D = 512, V = 50000, float32).
    """
    name = "linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    products = _autocast_dtype(x)
    args = {"x": (x, "B T D"), "weight": (weight, "V D"), "bias": (bias, "V")}
    call = OPERATOR.begin(args, alike=() if products else ("x", "weight", "bias"), backend=backend)
    V = call.sizes["V"]
    _check_targets(targets, x, V, ignore_index)
    if reduction == "mean" and shard.current() is not None:
        raise ValueError(
            f"{name}: reduction 'mean' would be that of one rank's slice of the sequence; "
            "use 'sum' and divide by the number of scored targets of all ranks"
        )
    targets = torch.where(targets == ignore_index, -1, torch.where(targets < 0, V, targets)).long()
    return _linear_cross_entropy(x, weight, bias, targets, reduction, call.backend, products or x.dtype)


@dispatch.keeps_its_precision
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str, chosen: str, products: torch.dtype
) -> Tensor:
    """The chosen form; targets (B, T) are tokens, -1 where not scored, V where there is no such token."""
    (B, T, D), rows = x.shape, targets.flatten()
    x = x.reshape(B * T, D)
    if chosen == "reference":
        losses = linear_cross_entropy_reference(x, weight, rows, bias)
        if reduction == "none":
            return losses.view(B, T)
        return losses.sum() if reduction == "sum" else losses.sum() / (rows >= 0).sum()
    step = TRITON_STEP if chosen == "triton" else TORCH_STEP
    drop = chosen == "torch" and x.device.type == "cpu"
    if reduction == "none":
        return token_losses(x, weight, bias, rows, products, drop, step).view(B, T)
    return reduced_loss(x, weight, bias, rows, reduction == "mean", products, drop, step)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of products on x's device; None without autocast."""
    device = x.device.type if isinstance(x, Tensor) else "cpu"  # what is no tensor is refused for that
    if device not in dispatch.AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def _check_targets(targets: Tensor, x: Tensor, vocabulary: int, ignore_index: int) -> None:
    name = "linear_cross_entropy"
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"{name}: targets must be a tensor of int64 or int32 tokens; got {got}")
    if targets.shape != x.shape[:2]:
        raise ValueError(f"{name}: targets must be (B, T) = {tuple(x.shape[:2])} as x is; got {tuple(targets.shape)}")
    if targets.device != x.device:
        raise ValueError(f"{name}: all tensors must be on one device; x is on {x.device}, targets on {targets.device}")
    if targets.device.type == "cpu":  # elsewhere looking would wait for the device
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
        if wrong.any():
            raise ValueError(
                f"{name}: targets must be in [0, V) = [0, {vocabulary}) or ignore_index = {ignore_index}; "
                f"got {int(targets[wrong][0])}"
            )
