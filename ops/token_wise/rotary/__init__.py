"""Rotary position embedding: pairs of channels turned by the angle of their position."""

from typing import Literal

import torch
from torch import Tensor

from zoo.ops.core import check, dispatch
from zoo.ops.core.call import Operator
from zoo.ops.token_wise.rotary.fused import rotary_fused
from zoo.ops.token_wise.rotary.reference import rotary_reference

__all__ = ["rotary"]

if dispatch.HAS_TRITON:
    from zoo.ops.token_wise.rotary import kernels

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")


OPERATOR = Operator("rotary", cp_kind="local", float64=True)


@OPERATOR.public(recomputed=True)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout = "half", backend: str = "auto") -> Tensor:
    """Turn every pair (a, b) of x by its angle: (a cos - b sin, a sin + b cos).

    Args:
        x: queries or keys, (B, T, H, K), K even, any float dtype; B may be any number of dimensions, or none.
        cos: cosines of the angles, (B, T, K / 2), or (1, T, K / 2) where all rows stand at the same positions; float32,
            or the dtype of x. Positions are the global ones of each document: the caller makes the tables. With other
            leading dimensions than one, theirs, or 1 for each.
        sin: sines, as cos.
        layout: "half" pairs x[m] with x[m + K/2] (LLaMA, GPT-NeoX); "interleaved" pairs x[2m] with x[2m + 1] (GPT-J).
        backend: "auto" (Triton on CUDA, else torch), "triton", "torch" or "reference".

    Returns:
        y: as x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, K is odd, an unknown layout, or the backend cannot run here.

    Cost: bound by memory traffic; the backward pass is the rotation by the negative angle and keeps only the tables.
    Source: arXiv 2104.09864.
    """
    name = "rotary"
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if isinstance(x, Tensor) and x.ndim != 4 and x.ndim > 2:
        flat, tables = x.reshape(-1, *x.shape[-3:]), [_rows(name, x, table) for table in (cos, sin)]
        return rotary(flat, *tables, layout=layout, backend=backend).view_as(x)
    check.shapes(name, {"x": (x, "B T H K")})
    B, T, _, K = x.shape
    if K % 2:
        raise ValueError(
            f"{name}: x must be (B, T, H, K) with an even K, for its channels are pairs; got {tuple(x.shape)}"
        )
    rows = 1 if isinstance(cos, Tensor) and cos.ndim == 3 and cos.shape[0] == 1 else B
    args = {"x": (x, "B T H K"), "cos": (cos, "rows T K/2"), "sin": (sin, "rows T K/2")}
    known = {"rows": rows, "T": T, "K/2": K // 2}
    call = OPERATOR.begin(args, alike=("cos", "sin"), known=known, backend=backend)
    if cos.dtype != torch.float32:
        check.same_dtype(name, x=x, cos=cos)
    if call.backend == "reference":
        return rotary_reference(x, cos, sin, layout == "interleaved")
    if call.backend == "torch":
        return rotary_fused(x, cos, sin, layout == "interleaved")
    y: Tensor = kernels.rotary_fwd(x, cos, sin, layout == "interleaved")
    return y


def _rows(name: str, x: Tensor, table: Tensor) -> Tensor:
    """A table (..., T, K / 2) for x (..., T, H, K), as (rows, T, K / 2); one row where all stand at the same places."""
    lead = tuple(table.shape[:-2])
    if len(lead) == x.ndim - 3 and set(lead) <= {1}:
        return table.reshape(1, *table.shape[-2:])
    if lead != tuple(x.shape[:-3]):
        raise ValueError(
            f"{name}: tables must lead with {tuple(x.shape[:-3])} as x does, or with ones; got {tuple(table.shape)}"
        )
    return table.reshape(-1, *table.shape[-2:])
