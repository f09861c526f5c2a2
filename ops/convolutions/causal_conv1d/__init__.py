"""Causal depthwise convolution with a carried tail: the short convolution in front of most mixers, and dilated ones."""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.convolutions.causal_conv1d import external
from zoo.ops.convolutions.causal_conv1d.reference import causal_conv1d_reference
from zoo.ops.convolutions.causal_conv1d.shifted import causal_conv1d_shifted, causal_conv1d_step
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Tail
from zoo.ops.core.call import Choice, Operator
from zoo.ops.core.chunks import chunk_table
from zoo.ops.core.packing import each_document

__all__ = ["causal_conv1d", "causal_conv1d_summary"]

if dispatch.HAS_TRITON:
    from zoo.ops.convolutions.causal_conv1d import kernels

ACTIVATIONS = (None, "silu")


OPERATOR = Operator("causal_conv1d", cp_kind="halo")


def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *,
    activation: str | None = None, dilation: int = 1, cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    D, W = weight.shape
    state = x.new_zeros(len(x), (W - 1) * dilation, D) if state is None else state
    return causal_conv1d_step(x, weight, bias, state, activation, dilation)


@OPERATOR.public(recomputed=True, step=_step)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
    dilation: int = 1,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal taps: y_t = act(bias + sum_w weight[:, w] * x_{t - (W-1-w) dilation}).

    Args:
        x: input, (B, T, D), any float dtype.
        weight: taps, (D, W), W >= 1; the last tap is the present token.
        bias: (D,), or None.
        state: the R = (W - 1) dilation inputs before the first token, oldest first, (B, R, D); zeros when omitted. With
            packed documents (n, R, D).
        activation: None or "silu", applied to the sum.
        dilation: steps between neighbouring taps, at least 1.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; taps never cross a border.
        backend: "auto" (on CUDA the package causal-conv1d where it is installed and takes the call, else Triton;
            elsewhere torch), "triton", "torch" or "reference".

    Returns:
        y: (B, T, D), in the dtype of x.
        tail: the last R inputs, (B, R, D) or (n, R, D), in the dtype of x; feed it back as `state`.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown activation, a dilation below 1, or the backend cannot
            run here.

    Cost: 2 B T D W operations whatever the dilation; bound by memory traffic. One token copies the state, R rows.
        Across ranks R rows come from the ranks before, one after the other where a stretch is shorter. Kernels
        accumulate in float32.
    Source: the depthwise short convolution of Mamba (arXiv 2312.00752), DeltaNet (arXiv 2406.06484) and others;
        dilation: arXiv 1803.01271, section 3.2.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation must be None or 'silu'; got {activation!r}")
    _check_dilation(dilation)
    with_state = state is not None or shard.current() is not None

    def instead() -> Choice | None:
        if dilation != 1 or not external.serves(
            x, weight.shape[1], packed=cu_seqlens is not None, with_state=with_state
        ):
            return None
        return Choice(external.PACKAGE, "the package is installed and takes the call")

    args = {"x": (x, "B T D"), "weight": (weight, "D W"), "bias": (bias, "D")}
    call = OPERATOR.begin(args, alike=("x", "weight", "bias"), cu_seqlens=cu_seqlens, backend=backend, instead=instead)
    halo = (weight.shape[1] - 1) * dilation
    rows = "W-1" if dilation == 1 else "(W-1)*dilation"
    state = call.state(state, f"{rows} D", dtype=x.dtype, **{rows: halo})
    if shard.current() is not None:
        (last,) = call.last_document(x)
        state = shard.halo(Tail.of(last, halo), state, call.several)

    if call.backend == external.PACKAGE:
        y = external.causal_conv1d_external(x, weight, bias, state if with_state else None, activation, call.cuts)
        return y, _tail(x, state, call.cuts)
    if call.backend == "reference":
        return each_document(
            lambda x, state: causal_conv1d_reference(x, weight, bias, state, activation, dilation),
            call.cuts,
            (x,),
            state,
        )
    if call.backend == "torch" and call.one_token:
        return causal_conv1d_step(x, weight, bias, state, activation, dilation)
    if call.backend == "torch":
        return causal_conv1d_shifted(x, weight, bias, state, activation, call.cuts, dilation)
    table = chunk_table(x.shape[0], x.shape[1], kernels.BLOCK_T, call.cuts, x.device)
    y = kernels.causal_conv1d_fwd(x, weight, bias, state, *table, activation == "silu", dilation)
    return y, _tail(x, state, call.cuts)


def causal_conv1d_summary(
    x: Tensor, width: int, *, dilation: int = 1, cu_seqlens: Tensor | None = None
) -> Tail:  # fmt: skip
    """What a stretch of time leaves to the taps after it: its last R = (W - 1) dilation inputs.

    Args:
        x: input, (B, T, D).
        width: W, the number of taps.
        dilation: steps between neighbouring taps.
        cu_seqlens: boundaries of packed documents, B = 1: only the last one hands inputs on, and before a document that
            begins inside the stretch there are zeros.

    Returns:
        Up to R rows, (B, min(T, R), D); `apply` gives the final tail.

    Raises:
        ValueError: x is no (B, T, D), or a dilation is below 1.
    """
    _check_dilation(dilation)
    halo = (width - 1) * dilation
    call = OPERATOR.begin({"x": (x, "B T D")}, cu_seqlens=cu_seqlens, name="causal_conv1d_summary")
    (last,) = call.last_document(x)
    element = Tail.of(last, halo)
    if call.cuts is None or len(call.cuts) == 2:
        return element
    return element.reset_to(element.apply(x.new_zeros(1, halo, x.shape[2])))


def _check_dilation(dilation: int) -> None:
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"causal_conv1d: dilation must be an integer of at least 1; got {dilation!r}, use 1 for none")


def _tail(x: Tensor, state: Tensor, cuts: tuple[int, ...] | None) -> Tensor:
    """The last rows of [state, document] for every document, as many as a state has."""
    return each_document(lambda x, s: (x, _last(s, x)), cuts, (x,), state)[1]


def _last(state: Tensor, x: Tensor) -> Tensor:
    """The last rows of [state, x], as many as the state has."""
    halo, length = state.shape[1], x.shape[1]
    recent = x[:, max(0, length - halo) :]
    # not a view, which would keep the whole stretch as long as the state lives
    return recent.clone() if length >= halo else torch.cat([state[:, length:], recent], dim=1)
