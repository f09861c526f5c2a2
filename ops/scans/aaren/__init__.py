"""Attention as a recurrence: a softmax-weighted average of all values so far, by scores that no later token changes."""

from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Closed, LogSumExp
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.scans.aaren.chunked import aaren_chunked, aaren_element, aaren_step
from zoo.ops.scans.aaren.reference import aaren_reference

__all__ = ["aaren", "aaren_summary"]

OPERATOR = Operator("aaren", cp_kind="reduce", forms=("torch",), no_kernels="its work is small matrix products")


@OPERATOR.public()
def aaren(
    s: Tensor, v: Tensor, state: LogSumExp | None = None, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, LogSumExp]:
    """Average values along time: o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j).

    It is causal softmax attention whose query is the same at every position, with scores s_j = q . k_j / sqrt(K).

    Args:
        s: scores, (B, T, H), finite, of any size, any float dtype.
        v: values, (B, T, H, V), in the dtype of s.
        state: m, u (B, H) and w (B, H, V): the largest score so far, and the sums of exp(s - m) and exp(s - m) v. A
            sequence that saw nothing has m = -inf and zeros, which is what omitting it means. Packed: n rows.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" and "torch" are the chunked form, "reference" is the loop.

    Returns:
        o: averages, (B, T, H, V), in the dtype of v.
        last: the state after the last token, float32 (float64 for float64 inputs); feed it back as `state`. The same
            past can be said with any m, by exp(-m) in u and w: only u exp(m) and w / u have a meaning.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 2 B T H (V + 1) C operations and B T H C exponentials in chunks of C = 32 tokens; the backward twice as much.
    Accumulates in float32 at least. The state has V + 2 numbers a head, at any length.
    Source: Feng et al., "Attention as an RNN", arXiv 2405.13956, section 3.
    """
    call = _begin(s, v, cu_seqlens=cu_seqlens, backend=backend)
    state = _state(call, state)
    wide = s.to(call.dtype), v.to(call.dtype)
    if shard.current() is not None:
        own = aaren_element(*call.last_document(*wide))
        state = shard.incoming_fold(LogSumExp.then, own, state, call.several, inputs=(s, v))
    if not call.length:
        return shard.tied(v, s, *state), state  # an empty stretch still hangs on every argument, and on what arrived
    if call.one_token:
        o, last = aaren_step(*wide, state)
    else:
        form = aaren_reference if call.backend == "reference" else aaren_chunked
        o, last = each_document(form, call.cuts, wide, state)
    return o.to(v.dtype), last


@dispatch.keeps_its_precision
def aaren_summary(s: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> LogSumExp | Closed[LogSumExp]:
    """What a stretch of time adds to any state.

    Args:
        s, v: as for `aaren`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        m, u, w as in the state of `aaren`; `apply` gives the final state.

    Raises:
        ValueError: shapes, dtypes or devices disagree.

    Cost: 2 B T H V operations. Differentiable.
    """
    call = _begin(s, v, cu_seqlens=cu_seqlens, name="aaren_summary")
    own = aaren_element(*call.last_document(s.to(call.dtype), v.to(call.dtype)))
    return Closed(own) if call.several else own


def _begin(s: Tensor, v: Tensor, *, cu_seqlens: Tensor | None, backend: str = "auto", name: str = "") -> Call:
    """The checked call of the operator, or of its summary."""
    args = {"s": (s, "B T H"), "v": (v, "B T H V")}
    return OPERATOR.begin(args, alike=("s", "v"), cu_seqlens=cu_seqlens, backend=backend, name=name)


def _state(call: Call, given: LogSumExp | None) -> LogSumExp:
    """The state before the first token, checked; what saw nothing when none is given."""
    if given is None:
        return LogSumExp.identity(call.state(None, "H V"))
    m, u, w = given
    return LogSumExp(call.state(m, "H"), call.state(u, "H"), call.state(w, "H V"))
