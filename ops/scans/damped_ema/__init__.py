"""Multi-dimensional damped moving averages: N decaying averages of each channel, weighed into one output."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Elementwise
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.scans.damped_ema.chunked import damped_ema_chunked
from zoo.ops.scans.damped_ema.reference import damped_ema_reference

__all__ = ["damped_ema", "damped_ema_summary"]


OPERATOR = Operator("damped_ema", cp_kind="affine")


def _step(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, *,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    state = x.new_zeros(len(x), *a.shape) if state is None else state
    return _token(x, a, b, c, state)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"x": 2, "a": 0, "b": 0, "c": 0})
def damped_ema(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Average each channel N times, h_t = a * h_{t-1} + b * x_t, and weigh the averages, y_t = sum_n c_n * h_t[n].

    MEGA's moving average is this one with a = 1 - p sigmoid(alpha), b = p beta and c = gamma / sqrt(N), for
    p = sigmoid(delta).

    Args:
        x: input, (B, T, D), any float dtype.
        a: what is left of an average after a step, (D, N), in [0, 1]; not a logarithm. Of any float dtype: bfloat16 has
            no number between 0.996 and 1, so leave it in float32.
        b: what a step adds to an average, (D, N), of the dtype of x.
        c: weights of the averages, (D, N), of the dtype of x.
        state: the averages before the first step, (B, D, N); zeros when omitted. With packed documents (n, D, N).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" and "torch" are matrix products in chunks of time; "triton" is the same with the kernels of
            `affine_scan` between the chunks, and "auto" takes them on CUDA; "reference" is the loop.

    Returns:
        y: (B, T, D), in the dtype of x.
        last: the averages after the last step, (B, D, N) or (n, D, N), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 2 (C + 2 N) operations a number of x, in chunks of C = 16 tokens; memory is linear in T. Accumulates in
        float32 at least.
    Source: arXiv 2209.10655, section 3.1 (equations 2 to 4).
    """
    call = _begin(x, a, b, c, cu_seqlens=cu_seqlens, backend=backend)
    state = call.state(state, "D N")
    a_, b_, c_ = (z.to(call.dtype) for z in (a, b, c))

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        if not call.length:
            return shard.tied(x, a, b, c, state), state
        if call.one_token:
            return _token(x, a_, b_, c_, state)
        wide = x.to(call.dtype)
        if call.backend == "reference":
            y, last = each_document(lambda x, h: damped_ema_reference(x, a_, b_, c_, h), call.cuts, (wide,), state)
        else:
            y, last = damped_ema_chunked(wide, a_, b_, c_, state, call.cuts, backend=call.backend)
        return y.to(x.dtype), last

    return shard.run_from_incoming(
        Elementwise,
        lambda: _element(call.last_document(x)[0], a_, b_, c_, backend=call.backend),
        run,
        state,
        call.several,
        inputs=(x, a, b, c),
    )


@dispatch.keeps_its_precision
def damped_ema_summary(
    x: Tensor, a: Tensor, b: Tensor, *, cu_seqlens: Tensor | None = None
) -> Elementwise:  # fmt: skip
    """What a stretch of time does to any averages: h -> a**T * h + those that come of none before.

    Args:
        x, a, b: as for `damped_ema`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a and b, (B, D, N) each, float32 (float64 for float64 inputs); `apply` gives the final state.

    Raises:
        ValueError: shapes, dtypes or devices disagree.

    Cost: one run over the last document. Differentiable.
    """
    call = _begin(x, a, b, b, cu_seqlens=cu_seqlens, name="damped_ema_summary")
    a, b = a.to(call.dtype), b.to(call.dtype)
    return call.bordered(_element(call.last_document(x)[0], a, b, b, backend=call.backend))


def _begin(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, *, cu_seqlens: Tensor | None, backend: str = "auto", name: str = ""
) -> Call:
    """The checked call of the operator, or of its summary."""
    args = {"x": (x, "B T D"), "a": (a, "D N"), "b": (b, "D N"), "c": (c, "D N")}
    return OPERATOR.begin(args, alike=("x", "b", "c"), cu_seqlens=cu_seqlens, backend=backend, name=name)


def _token(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of every row; a, b, c in the dtype of the state."""
    h = torch.addcmul(a * state, b, x[:, 0].to(state.dtype).unsqueeze(-1))  # (B, D, N)
    return (c * h).sum(-1).unsqueeze(1).to(x.dtype), h


def _element(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *, backend: str) -> Elementwise:
    """The powers of a, and the averages that come of none before; c is not used."""
    B, T, _ = x.shape
    zeros = torch.zeros(B, *a.shape, dtype=a.dtype, device=a.device)
    left = (a**T).expand(B, *a.shape)
    if not T:
        return Elementwise(left, zeros)
    form = "torch" if backend == "reference" else backend
    return Elementwise(left, damped_ema_chunked(x.to(a.dtype), a, b, c, zeros, None, backend=form)[1])
