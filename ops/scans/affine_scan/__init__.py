"""Elementwise affine recurrences: what selective state spaces, moving averages and Newton steps have in common."""

import math

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Elementwise
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.scans.affine_scan.reference import affine_scan_reference
from zoo.ops.scans.affine_scan.two_level import affine_scan_two_level

__all__ = ["affine_scan", "affine_scan_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.scans.affine_scan import kernels


OPERATOR = Operator("affine_scan", cp_kind="affine")


@OPERATOR.public()
@shard.over_heads(split={"b": 2, "a": 2}, shared=("resets",))
def affine_scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the elementwise recurrence h_t = a_t * h_{t-1} + b_t along time.

    Args:
        a: transitions, (B, T, ...), any real numbers, not logarithms; sizes of 1 are broadcast to those of b.
        b: inputs, (B, T, ...), any float dtype, the same as a.
        state: h before the first step, (B, ...); zeros when omitted. With packed documents (n, ...).
        resets: (B, T) bool, or None: where true, a new episode begins and the state before the step is dropped.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single step), "triton", "torch" or
            "reference".

    Returns:
        h: all states, (B, T, ...), in the dtype of b.
        last: the state after the last step, (B, ...) or (n, ...), float32 (float64 for float64 inputs); feed it back as
            `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 2 operations a number, or 4 where chunks of time run side by side; bound by memory traffic. Accumulates in
    float32 at least. The backward is one more scan and keeps a and h only.
    Source: Blelloch, "Prefix sums and their applications", 1990, section 1.4; resets: arXiv 2303.03982, section 3.
    """
    call, a = _begin(a, b, resets, cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, " ".join(_dims(b)[2:]))

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        if call.one_token:
            last = torch.addcmul(b[:, 0].to(state.dtype), a[:, 0].to(state.dtype), state)
            return last.unsqueeze(1).to(b.dtype), last
        return _run(call.backend, a, b, state, call.cuts)

    return shard.run_from_incoming(
        Elementwise,
        lambda: _element(*call.last_document(a, b), chosen=call.backend),
        run,
        state,
        call.several,
        inputs=(a, b),
    )


@dispatch.keeps_its_precision
def affine_scan_summary(
    a: Tensor, b: Tensor, *, resets: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Elementwise:
    """What a stretch of time does to any state: h -> a * h + b.

    Args:
        a, b, resets: as for `affine_scan`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a and b, (B, ...) each, float32 (float64 for float64 inputs); `apply` gives the final state.

    Cost: two scans over the last document. Differentiable.
    """
    call, a = _begin(a, b, resets, cu_seqlens=cu_seqlens, name="affine_scan_summary")
    return call.bordered(_element(*call.last_document(a, b), chosen=call.backend))


def _dims(b: Tensor) -> list[str]:
    """Names for the dimensions of b."""
    after = getattr(b, "ndim", 3) - 2
    return ["B", "T", *(["D"] if after == 1 else [f"D{i + 1}" for i in range(after)])]


def _begin(
    a: Tensor, b: Tensor, resets: Tensor | None, *, cu_seqlens: Tensor | None, backend: str = "auto", name: str = ""
) -> tuple[Call, Tensor]:
    """The checked call, and a in the shape of b with zeros where episodes begin."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim
    if both and all(x in (1, y) for x, y in zip(a.shape, b.shape, strict=True)):
        a = a.expand(b.shape)
    dims = " ".join(_dims(b))
    args = {"b": (b, dims), "a": (a, dims)}
    call = OPERATOR.begin(args, alike=("a", "b"), cu_seqlens=cu_seqlens, backend=backend, name=name)
    if (begins := call.resets(resets)) is not None:
        a = a.masked_fill(begins.view(*begins.shape, *(1 for _ in b.shape[2:])), 0)
    return call, a


def _run(
    chosen: str, a: Tensor, b: Tensor, state: Tensor, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen form, on channels in one dimension."""
    B, T, *shape = b.shape
    if chosen == "reference" and T:
        return each_document(affine_scan_reference, cuts, (a, b), state)
    D = math.prod(shape)
    a_, b_, state_ = a.reshape(B, T, D), b.reshape(B, T, D), state.reshape(-1, D)
    if chosen == "triton" and b.numel() and b.dtype != torch.float64:
        h, last = kernels.affine_fwd(a_, b_, state_, *chunk_table(B, T, kernels.CHUNK, cuts, b.device))
    else:
        h, last = affine_scan_two_level(a_, b_, state_, cuts)
    return h.view(b.shape), last.view(state.shape)


def _element(a: Tensor, b: Tensor, *, chosen: str) -> Elementwise:
    """The product of the transitions, and the state that comes of none before: both are last states of scans."""
    dtype = dispatch.state_dtype(b)
    zeros = torch.zeros(b.shape[0], *b.shape[2:], dtype=dtype, device=b.device)
    product = _run(chosen, a, torch.zeros_like(b), zeros + 1, None)[1]
    return Elementwise(product, _run(chosen, a, b, zeros, None)[1])
