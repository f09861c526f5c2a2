"""RMSNorm, plain and gated in both orders of the field."""

from typing import Literal

from torch import Tensor

from zoo.ops.core import check, dispatch
from zoo.ops.token_wise.rms_norm.fused import rms_norm_fused
from zoo.ops.token_wise.rms_norm.reference import rms_norm_reference

__all__ = ["gated_rms_norm", "rms_norm"]

if dispatch.HAS_TRITON:
    from zoo.ops.token_wise.rms_norm import kernels

Order = Literal["norm_first", "gate_first"]
ORDERS: tuple[Order, ...] = ("norm_first", "gate_first")


@dispatch.keeps_its_precision
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """Divide by the root mean square: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: input, (B, T, D) or (B, T, H, D), any float dtype.
        weight: (D,), or None for none.
        eps: added to the mean square, > 0 for rows of zeros to stay zeros.
        backend: "auto" (Triton on CUDA, else torch), "triton", "torch" or "reference".

    Returns:
        y: as x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, eps < 0, or the backend cannot run here (kernels take D up to
            16384).

    Cost: bound by memory traffic: reads x once, and x and dy once in the backward pass. Statistics are float32
    (float64 for float64 inputs). The kernels' weight gradient is the same in every run: no atomic additions.
    Source: arXiv 1910.07467.
    """
    return _norm("rms_norm", x, None, weight, eps, False, backend)


@dispatch.keeps_its_precision
def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    order: Order = "norm_first",
    backend: str = "auto",
) -> Tensor:
    """RMSNorm with a gate: norm(x) * weight * silu(gate), or norm(x * silu(gate)) * weight with the gate first.

    Args:
        x: input, (B, T, D) or (B, T, H, D), any float dtype.
        gate: as x, before its silu.
        weight: (D,), or None for none.
        eps: added to the mean square.
        order: "norm_first" (GLA, DeltaNet) or "gate_first" (Mamba-2).
        backend: "auto" (Triton on CUDA, else torch), "triton", "torch" or "reference".

    Returns:
        y: as x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown order, eps < 0, or the backend cannot run here.

    Cost: bound by memory traffic; only x and gate are kept for the backward pass.
    Source: the output gates of GLA (arXiv 2312.06635) and Mamba-2 (arXiv 2405.21060).
    """
    name = "gated_rms_norm"
    if order not in ORDERS:
        raise ValueError(f"{name}: order must be one of {', '.join(ORDERS)}; got {order!r}")
    return _norm(name, x, gate, weight, eps, order == "gate_first", backend)


def _norm(
    name: str, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool, backend: str
) -> Tensor:
    dims = "B T H D" if isinstance(x, Tensor) and x.ndim == 4 else "B T D"
    D = check.shapes(name, {"x": (x, dims), "gate": (gate, dims), "weight": (weight, "D")})["D"]
    check.same_dtype(name, x=x, gate=gate, weight=weight)
    if eps < 0:
        raise ValueError(f"{name}: eps must not be negative; got {eps}")
    chosen = dispatch.resolve(name, backend, x)
    if chosen == "triton" and kernels.MAX_D < D:
        if backend == "triton":
            raise ValueError(f"{name}: kernels hold whole rows, D <= {kernels.MAX_D}; got {D}, use backend='torch'")
        chosen = "torch"
    if chosen == "reference":
        return rms_norm_reference(x, gate, weight, eps, gate_first)
    if chosen == "torch":
        return rms_norm_fused(x, weight, eps, gate, gate_first)
    return kernels.rms_norm_fwd(x, gate, weight, eps, gate_first)
