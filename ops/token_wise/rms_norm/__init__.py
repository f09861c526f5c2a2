"""RMSNorm, plain and gated in both orders of the field."""

from typing import Literal

from torch import Tensor

from zoo.ops.core import check, dispatch
from zoo.ops.core.call import Limit, Operator
from zoo.ops.token_wise.rms_norm.fused import rms_norm_fused
from zoo.ops.token_wise.rms_norm.reference import rms_norm_reference

__all__ = ["gated_rms_norm", "rms_norm"]

if dispatch.HAS_TRITON:
    from zoo.ops.token_wise.rms_norm import kernels

Order = Literal["norm_first", "gate_first"]
ORDERS: tuple[Order, ...] = ("norm_first", "gate_first")

MAX_D = 16384  # a row of float32 is then 64 registers a thread in each of the backward's tiles

LIMITS = [Limit("D", MAX_D, "rows")]
RMS_NORM = Operator("rms_norm", cp_kind="local", limits=LIMITS, float64=True)
GATED_RMS_NORM = Operator("gated_rms_norm", cp_kind="local", limits=LIMITS, float64=True)


def _plain_step(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """One token of decoding, checked."""
    return rms_norm_fused(x, weight, eps)


def _gated_step(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, order: Order = "norm_first",
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """One token of decoding, checked."""
    return rms_norm_fused(x, weight, eps, gate, order == "gate_first")


@RMS_NORM.public(recomputed=True, step=_plain_step)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """Divide by the root mean square: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: input, (..., D), any float dtype.
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
    return _norm(RMS_NORM, x, None, weight, eps, False, backend)


@GATED_RMS_NORM.public(recomputed=True, step=_gated_step)
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
        x: input, (..., D), any float dtype.
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
    if order not in ORDERS:
        raise ValueError(f"gated_rms_norm: order must be one of {', '.join(ORDERS)}; got {order!r}")
    return _norm(GATED_RMS_NORM, x, gate, weight, eps, order == "gate_first", backend)


def _norm(
    operator: Operator,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    gate_first: bool,
    backend: str,
) -> Tensor:
    if isinstance(x, Tensor) and x.ndim not in (3, 4):
        rows, gates = check.in_rows(operator.name, "D", x=x, gate=gate)
        assert rows is not None
        return _norm(operator, rows, gates, weight, eps, gate_first, backend).view(x.shape)
    dims = "B T H D" if isinstance(x, Tensor) and x.ndim == 4 else "B T D"
    args = {"x": (x, dims), "gate": (gate, dims), "weight": (weight, "D")}
    call = operator.begin(args, alike=("x", "gate", "weight"), backend=backend)
    if eps < 0:
        raise ValueError(f"{call.name}: eps must not be negative; got {eps}")
    if call.backend == "reference":
        return rms_norm_reference(x, gate, weight, eps, gate_first)
    if call.backend == "torch":
        return rms_norm_fused(x, weight, eps, gate, gate_first)
    y: Tensor = kernels.rms_norm_fwd(x, gate, weight, eps, gate_first)
    return y
