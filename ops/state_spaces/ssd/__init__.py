"""State space duality (Mamba-2): a matrix memory with one decay per head and step."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Diagonal
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.state_spaces.ssd.chunked import ssd_chunked, ssd_step
from zoo.ops.state_spaces.ssd.reference import ssd_reference

__all__ = ["ssd", "ssd_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.state_spaces.ssd import kernels


OPERATOR = Operator("ssd", cp_kind="affine")


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, state: Tensor | None = None, *,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    batch, _, H, P = x.shape
    return ssd_step(x, dt, A, B, C, D, x.new_zeros(batch, H, B.shape[-1], P) if state is None else state)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"x": 2, "dt": 2, "A": 0, "D": 0}, grouped={"B": 2, "C": 2})
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t along time, head by head.

    With A = 0 this is linear attention with q = C, k = B, v = dt x; with constant dt it is RetNet's retention.

    Args:
        x: input, (B, T, H, P), any float dtype, shared by x, B and C.
        dt: step sizes, (B, T, H), >= 0 (not checked; already behind their softplus); float32 is best.
        A: rate of each head, (H,), <= 0 (not checked).
        B, C: what writes to and reads from the memory, (B, T, G, N); H / G neighbouring heads share a group.
        D: weight of the input on the output, (H,), or None.
        state: the memory before the first token, (B, H, N, P); zeros when omitted. With packed documents (n, H, N, P).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single token), "triton", "torch" or
            "reference".

    Returns:
        y: (B, T, H, P), in the dtype of x.
        S: the memory after the last token, (B, H, N, P) or (n, H, N, P), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: O(B T H N P) operations by chunks of Q tokens, and O(B T H Q P) inside them; the state is N P numbers a head.
    Source: arXiv 2405.21060, section 6; the names are the official code's.
    """
    call = _begin(x, dt, A, B, C, D, cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "H N P")
    if shard.current() is not None:
        state = shard.incoming_state(_element(*call.last_document(x, dt, B), A=A), state, call.several)
    if call.backend == "reference":
        return each_document(
            lambda x, dt, B, C, S: ssd_reference(x, dt, A, B, C, D, S), call.cuts, (x, dt, B, C), state
        )  # fmt: skip
    if call.one_token:
        return ssd_step(x, dt, A, B, C, D, state)
    if call.backend == "triton":
        begin, end, _, offsets = chunk_table(x.shape[0], x.shape[1], kernels.CHUNK, call.cuts, x.device)
        result: tuple[Tensor, Tensor] = kernels.ssd_fwd(x, dt, A, B, C, D, state, begin, end, offsets)
        return result
    return ssd_chunked(x, dt, A, B, C, D, state, call.cuts)


def _begin(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, D: Tensor | None, *, cu_seqlens: Tensor | None,
    backend: str = "auto", name: str = "",
) -> Call:  # fmt: skip
    args = {
        "x": (x, "B T H P"), "dt": (dt, "B T H"), "A": (A, "H"), "B": (B, "B T G N"), "C": (C, "B T G N"),
        "D": (D, "H"),
    }  # fmt: skip
    call = OPERATOR.begin(args, alike=("x", "B", "C"), cu_seqlens=cu_seqlens, backend=backend, name=name)
    if call.sizes["G"] == 0 or call.sizes["H"] % call.sizes["G"]:
        raise ValueError(
            f"{call.name}: the number of heads must be a multiple of the groups of B and C; "
            f"got H = {call.sizes['H']}, G = {call.sizes['G']}"
        )
    return call


@dispatch.keeps_its_precision
def ssd_summary(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, cu_seqlens: Tensor | None = None) -> Diagonal:
    """What a stretch of time does to any memory: S -> exp(log_a) S + b.

    Args:
        x, dt, A, B: as for `ssd`.
        cu_seqlens: boundaries of packed documents, B = 1: the memory enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        log_a (B, H, 1) and b (B, H, N, P), float32 (float64 for float64 inputs); `apply` gives the final memory.

    Cost: one matrix product over the last document. Differentiable.
    """
    call = _begin(x, dt, A, B, None, None, cu_seqlens=cu_seqlens, name="ssd_summary")
    return call.bordered(_element(*call.last_document(x, dt, B), A=A))


def _element(x: Tensor, dt: Tensor, B: Tensor, *, A: Tensor) -> Diagonal:
    """Token t reaches the end through the decay of all later tokens, a sum that ends at 0: exponents are <= 0."""
    dtype = dispatch.state_dtype(x)
    x, dt, B = (z.to(dtype) for z in (x, dt, B))
    a = dt * A.to(dtype)
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).flip(1).cumsum(1).flip(1)  # (B, T, H)
    z = ((dt * later.exp()).unsqueeze(-1) * x).unflatten(2, (B.shape[2], x.shape[2] // B.shape[2]))  # (B, T, G, R, P)
    return Diagonal(a.sum(1).unsqueeze(-1), torch.einsum("btgn,btgrp->bgrnp", B, z).flatten(1, 2))
