"""Affine recurrences of complex numbers, with resets: diagonal state spaces as scans."""

import math

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import ComplexElementwise
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.core.pairs import as_complex, as_pairs
from zoo.ops.scans.affine_scan.two_level import affine_scan_two_level
from zoo.ops.scans.complex_affine_scan.reference import complex_affine_scan_reference

__all__ = ["complex_affine_scan", "complex_affine_scan_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.scans.complex_affine_scan import kernels


OPERATOR = Operator("complex_affine_scan", cp_kind="affine")


@OPERATOR.public()
def complex_affine_scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence h_t = a_t * h_{t-1} + b_t along time on complex numbers, as pairs (..., 2) of real ones.

    Args:
        a: transitions, (B, T, ..., 2); sizes of 1 are broadcast to those of b. Transitions of a time-invariant system,
            (1, 1, ..., 2), are never written out by the kernels.
        b: inputs, (B, T, ..., 2), any float dtype, the same as a.
        state: h before the first step, (B, ..., 2); zeros when omitted. With packed documents (n, ..., 2).
        resets: (B, T) bool, or None: where true, a new episode begins and the state before the step is dropped.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single step), "triton", "torch" or
            "reference".

    Returns:
        h: all states, (B, T, ..., 2), in the dtype of b.
        last: the state after the last step, (B, ..., 2) or (n, ..., 2), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 8 operations a complex number, or 22 where chunks of time run side by side; bound by memory traffic.
        Accumulates in float32 at least. The backward is one more scan and keeps a and h only.
    Source: arXiv 2208.04933, section 3; resets: arXiv 2303.03982, section 3 (their operator on triples gives the same
        states as transitions of zero).
    """
    call, whole = _begin(a, b, cu_seqlens=cu_seqlens, backend=backend)
    begins = call.resets(resets)
    state = call.state(state, " ".join(_dims(b)[2:]))

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        if call.one_token:
            element = ComplexElementwise(_masked(whole, begins)[:, 0].to(state.dtype), b[:, 0].to(state.dtype))
            end = element.apply(state)
            return end.unsqueeze(1).to(b.dtype), end
        return _run(call.backend, a if a.shape[:2] == (1, 1) else whole, b, begins, state, call.cuts)

    return shard.run_from_incoming(
        ComplexElementwise,
        lambda: _element(*call.last_document(whole, b, begins), chosen=call.backend),
        run,
        state,
        call.several,
        inputs=(a, b),
    )


@dispatch.keeps_its_precision
def complex_affine_scan_summary(
    a: Tensor, b: Tensor, *, resets: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> ComplexElementwise:
    """What a stretch of time does to any state: h -> a * h + b.

    Args:
        a, b, resets: as for `complex_affine_scan`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a and b, (B, ..., 2) each, float32 (float64 for float64 inputs); `apply` gives the final state.

    Cost: two scans over the last document. Differentiable.
    """
    call, a = _begin(a, b, cu_seqlens=cu_seqlens, name="complex_affine_scan_summary")
    return call.bordered(_element(*call.last_document(a, b, call.resets(resets)), chosen=call.backend))


def _dims(*tensors: Tensor) -> list[str]:
    """Names for the dimensions of b, or of whichever has more of them."""
    channels = max(getattr(x, "ndim", 4) for x in tensors) - 3
    return ["B", "T", *(["D"] if channels == 1 else [f"D{i + 1}" for i in range(channels)]), "2"]


def _begin(
    a: Tensor, b: Tensor, *, cu_seqlens: Tensor | None, backend: str = "auto", name: str = ""
) -> tuple[Call, Tensor]:
    """The checked call, and a in the shape of b."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim
    if both and a.shape[-1:] == (2,) and all(x in (1, y) for x, y in zip(a.shape, b.shape, strict=True)):
        a = a.expand(b.shape)
    dims = " ".join(_dims(a, b))
    args = {"b": (b, dims), "a": (a, dims)}
    call = OPERATOR.begin(
        args, alike=("a", "b"), known={"2": 2}, cu_seqlens=cu_seqlens, backend=backend, name=name
    )  # fmt: skip
    return call, a


def _masked(a: Tensor, resets: Tensor | None) -> Tensor:
    """Transitions of zero where an episode begins."""
    return a if resets is None else a.masked_fill(resets.view(*resets.shape, *(1 for _ in a.shape[2:])), 0)


def _run(
    chosen: str, a: Tensor, b: Tensor, resets: Tensor | None, state: Tensor, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """The chosen form, on channels in one dimension."""
    B, T, *shape, _ = b.shape
    if chosen == "reference" and T:
        return each_document(complex_affine_scan_reference, cuts, (_masked(a.expand(b.shape), resets), b), state)
    D = math.prod(shape)
    b_, state_ = b.reshape(B, T, D, 2), state.reshape(-1, D, 2)
    if chosen == "triton" and b.numel() and b.dtype != torch.float64:
        constant = a.shape[:2] == (1, 1) and (B, T) != (1, 1)
        a_ = a.expand(1, 1, *shape, 2).reshape(D, 2) if constant else a.expand(b.shape).reshape(B, T, D, 2)
        keep = b.new_empty(0, dtype=torch.uint8) if resets is None else (~resets).to(torch.uint8)
        table = chunk_table(B, T, kernels.CHUNK, cuts, b.device)
        h, last = kernels.complex_affine_fwd(a_, b_, keep, state_, *table)
    else:
        dtype = state.dtype
        transitions = as_complex(a.to(dtype)).expand(b.shape[:-1])  # expanded last: constant ones stay one row
        transitions = _masked(transitions, resets).reshape(B, T, D)
        states, end = affine_scan_two_level(transitions, as_complex(b_.to(dtype)), as_complex(state_.to(dtype)), cuts)
        h, last = as_pairs(states).to(b.dtype), as_pairs(end)
    return h.view(b.shape), last.view(state.shape)


def _element(a: Tensor, b: Tensor, resets: Tensor | None, *, chosen: str) -> ComplexElementwise:
    """The product of the transitions, and the state that comes of none before: both are last states of scans."""
    dtype = dispatch.state_dtype(b)
    zeros = torch.zeros(b.shape[0], *b.shape[2:], dtype=dtype, device=b.device)
    one = torch.stack([zeros[..., 0] + 1, zeros[..., 1]], dim=-1)
    product = _run(chosen, a, torch.zeros_like(b), resets, one, None)[1]
    return ComplexElementwise(product, _run(chosen, a, b, resets, zeros, None)[1])
