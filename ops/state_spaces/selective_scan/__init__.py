"""The selective scan of Mamba: a linear recurrence per channel whose step size and maps depend on the token."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Elementwise
from zoo.ops.core.call import Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document
from zoo.ops.state_spaces.selective_scan.chunked import selective_scan_chunked, selective_scan_step
from zoo.ops.state_spaces.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.state_spaces.selective_scan import kernels


OPERATOR = Operator("selective_scan", cp_kind="affine")


def _step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, state: Tensor | None = None, *,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    return selective_scan_step(u, delta, A, B, C, D, u.new_zeros(len(u), *A.shape) if state is None else state)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"u": 2, "delta": 2, "A": 0, "D": 0}, shared=("B", "C"))
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run N decaying states per channel: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T, y_t = h_t C_t + D u_t.

    Args:
        u: input, (B, T, E), any float dtype, shared by u, B and C.
        delta: step sizes, (B, T, E), >= 0: after the softplus, bias included. Its dtype may differ, float32 is best.
        A: decay rates, (E, N), <= 0 (not checked): -exp(A_log). Its dtype may differ, float32 is best.
        B, C: input and output maps, (B, T, N), shared by all channels.
        D: skip, (E,), or None.
        state: h before the first token, (B, E, N); zeros when omitted. With packed documents (n, E, N).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere, for float64 and for a single token), "triton", "torch" or
            "reference".

    Returns:
        y: (B, T, E), in the dtype of u.
        h: the state after the last token, (B, E, N) or (n, E, N), float32 (float64 for float64 inputs); feed it back as
            `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: about 8 B T E N operations. Numbers of the size (T, E, N) exist for one chunk of time only; for the backward
    the states between chunks are kept, and each chunk is computed again.
    Source: arXiv 2312.00752, algorithm 2, with the official code's Euler step for B.
    """
    args = {
        "u": (u, "B T E"), "delta": (delta, "B T E"), "A": (A, "E N"), "B": (B, "B T N"), "C": (C, "B T N"),
        "D": (D, "E"),
    }  # fmt: skip
    call = OPERATOR.begin(args, alike=("u", "B", "C"), cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "E N")

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        if call.backend == "reference":
            return each_document(
                lambda u, delta, B, C, h: selective_scan_reference(u, delta, B, C, h, A, D), call.cuts,
                (u, delta, B, C), state,
            )  # fmt: skip
        if call.one_token:
            return selective_scan_step(u, delta, A, B, C, D, state)
        if call.backend == "triton":
            table = chunk_table(u.shape[0], u.shape[1], kernels.CHUNK, call.cuts, u.device)
            y, last, _, _ = kernels.selective_fwd(u, delta, A, B, C, D, state, *table)
            return y, last
        return selective_scan_chunked(u, delta, A, B, C, D, state, call.cuts)

    return shard.run_from_incoming(
        Elementwise,
        lambda: _element(*call.last_document(u, delta, B), A=A),
        run,
        state,
        call.several,
        inputs=(u, delta, A, B, C, D),
    )


@dispatch.keeps_its_precision
def selective_scan_summary(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, cu_seqlens: Tensor | None = None
) -> Elementwise:
    """What a stretch of time does to any state: h -> a * h + b.

    Args:
        u, delta, A, B: as for `selective_scan`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a = exp(A sum of delta) and b, (B, E, N) each, float32 (float64 for float64 inputs); `apply` gives the final h.

    Cost: one scan over the last document. Differentiable.
    """
    args = {"u": (u, "B T E"), "delta": (delta, "B T E"), "A": (A, "E N"), "B": (B, "B T N")}
    call = OPERATOR.begin(args, alike=("u", "B"), cu_seqlens=cu_seqlens, name="selective_scan_summary")
    return call.bordered(_element(*call.last_document(u, delta, B), A=A))


def _element(u: Tensor, delta: Tensor, B: Tensor, *, A: Tensor) -> Elementwise:
    """The decay of the whole stretch, and what its inputs leave behind: the last state of a scan from zeros."""
    dtype = dispatch.state_dtype(u)
    a = (delta.to(dtype).sum(1).unsqueeze(-1) * A.to(dtype)).exp()
    zeros = torch.zeros_like(a)
    if OPERATOR.choose("auto", u).backend == "triton" and u.shape[1]:
        table = chunk_table(u.shape[0], u.shape[1], kernels.CHUNK, None, u.device)
        return Elementwise(a, kernels.selective_fwd(u, delta, A, B, B, None, zeros, *table)[1])
    return Elementwise(a, selective_scan_chunked(u, delta, A, B, B, None, zeros, None)[1])
