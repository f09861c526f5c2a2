"""Affine recurrences of two numbers per channel: what the Newton steps of ParaLSTM are."""

import math

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Block2x2
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.scans.block_affine_scan.reference import block_affine_scan_reference
from zoo.ops.scans.block_affine_scan.two_level import block_affine_scan_two_level

__all__ = ["block_affine_scan", "block_affine_scan_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.scans.block_affine_scan import kernels


OPERATOR = Operator("block_affine_scan", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"b": 2, "A": 2})
def block_affine_scan(
    A: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence h_t = A_t h_{t-1} + b_t along time, with a 2x2 block for each channel.

    Args:
        A: transitions, (B, T, ..., 2, 2), any real numbers. Best made as four planes, `torch.stack([torch.stack([a00,
            a01]), torch.stack([a10, a11])]).movedim((0, 1), (-2, -1))`: the scan works on planes and copies otherwise.
        b: inputs, (B, T, ..., 2), any float dtype, the same as A; planes are best.
        state: h before the first step, (B, ..., 2); zeros when omitted. With packed documents (n, ..., 2).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through. A reset
            inside a sequence is a block of zeros.
        backend: "auto" (Triton on CUDA, else torch; torch for float64), "triton", "torch" or "reference".

    Returns:
        h: all states, (B, T, ..., 2), in the dtype of b; its two planes are contiguous.
        last: the state after the last step, (B, ..., 2) or (n, ..., 2), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 8 operations a channel, or up to 30 where chunks of time run side by side; bound by memory traffic.
        Accumulates in float32 at least. The backward is one more scan and keeps A and h only.
    Source: arXiv 2510.21450, section 3 (ParaLSTM).
    """
    call = _begin(A, b, cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, " ".join(_dims(b)[2:]))

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        if call.backend == "reference":
            return each_document(block_affine_scan_reference, call.cuts, (A, b), state)
        return _run(call.backend, A, b, state, call.cuts)

    return shard.run_from_incoming(
        Block2x2,
        lambda: _element(*call.last_document(A, b), chosen=call.backend),
        run,
        state,
        call.several,
        inputs=(A, b),
    )


@dispatch.keeps_its_precision
def block_affine_scan_summary(A: Tensor, b: Tensor, *, cu_seqlens: Tensor | None = None) -> Block2x2:
    """What a stretch of time does to any state: h -> A h + b.

    Args:
        A, b: as for `block_affine_scan`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        A (B, ..., 2, 2) and b (B, ..., 2), float32 (float64 for float64 inputs); `apply` gives the final state.

    Cost: three scans over the last document. Differentiable.
    """
    call = _begin(A, b, cu_seqlens=cu_seqlens, name="block_affine_scan_summary")
    return call.bordered(_element(*call.last_document(A, b), chosen=call.backend))


def _dims(b: Tensor) -> list[str]:
    """Names for the dimensions of b."""
    channels = getattr(b, "ndim", 4) - 3
    return ["B", "T", *(["D"] if channels == 1 else [f"D{i + 1}" for i in range(channels)]), "2"]


def _begin(A: Tensor, b: Tensor, *, cu_seqlens: Tensor | None, backend: str = "auto", name: str = "") -> Call:
    dims = " ".join(_dims(b))
    args = {"A": (A, f"{dims} 2"), "b": (b, dims)}
    return OPERATOR.begin(
        args, alike=("A", "b"), known={"2": 2}, cu_seqlens=cu_seqlens, backend=backend, name=name
    )  # fmt: skip


def _run(
    chosen: str, A: Tensor, b: Tensor, state: Tensor, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen form, on planes with the channels in one dimension."""
    B, T, *shape, _ = b.shape
    D = math.prod(shape)
    A_ = A.reshape(B, T, D, 2, 2).permute(3, 4, 0, 1, 2).contiguous()
    b_, state_ = b.reshape(B, T, D, 2).movedim(-1, 0).contiguous(), state.reshape(-1, D, 2).movedim(-1, 0).contiguous()
    if chosen == "triton" and b.numel() and b.dtype != torch.float64:
        h, last = kernels.block_affine_fwd(A_, b_, state_, *chunk_table(B, T, kernels.CHUNK, cuts, b.device))
    else:
        h, last = block_affine_scan_two_level(A_, b_, state_, cuts)
    return h.movedim(0, -1).reshape(b.shape), last.movedim(0, -1).reshape(state.shape)


def _element(A: Tensor, b: Tensor, *, chosen: str) -> Block2x2:
    """The product of the blocks, column by column, and the state that comes of none before."""
    zeros = torch.zeros(b.shape[0], *b.shape[2:], dtype=dispatch.state_dtype(b), device=b.device)
    columns = []
    for j in range(2):
        unit = zeros.clone()
        unit[..., j] = 1
        columns.append(_run(chosen, A, torch.zeros_like(b), unit, None)[1])
    return Block2x2(torch.stack(columns, dim=-1), _run(chosen, A, b, zeros, None)[1])
