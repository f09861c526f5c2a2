"""pLSTM on a line: a gated linear attention whose transitions have signs, and whose mark reads the state before."""

from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Elementwise
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.linear_attention.plstm.chunked import plstm_chunked, plstm_step
from zoo.ops.linear_attention.plstm.reference import plstm_reference

__all__ = ["plstm", "plstm_summary"]

OPERATOR = Operator("plstm", cp_kind="affine", forms=("torch",), no_kernels="its chunks are batched matrix products")
GATES = ("source", "transition", "mark", "direct")


def _step(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor,
    state: Tensor | None = None, *, scale: float | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of decoding, checked."""
    K, V = q.shape[-1], v.shape[-1]
    if state is None:
        state = q.new_zeros(*q.shape[::2], K, V)
    return plstm_step(q, k, v, source, transition, mark, direct, state, K**-0.5 if scale is None else scale)


@OPERATOR.public(step=_step)
@shard.over_heads(split={"q": 2, "k": 2, "v": 2, "source": 2, "transition": 2, "mark": 2, "direct": 2})
def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run C_t = T_t C_{t-1} + S_t k_t v_t^T, o_t = scale q_t^T (M_t C_{t-1} + D_t k_t v_t^T).

    Args:
        q, k: queries and keys, (B, T, H, K), any float dtype, shared by q, k and v. Any K and V.
        v: values, (B, T, H, V).
        source: S, what a token writes, (B, T, H); the dtype of gates may differ from that of q, float32 is best.
        transition: T, what the state keeps, (B, T, H), in [-1, 1] (not checked); signs and zeros are fine.
        mark: M, how the state before the token is read, (B, T, H).
        direct: D, how the token itself is read, (B, T, H).
        state: C before the first token, (B, H, K, V); zeros when omitted. With packed documents (n, H, K, V).
        scale: factor on q; K**-0.5 when omitted.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" and "torch" are the chunks, on any device; "reference" is the loop.

    Returns:
        o: (B, T, H, V), in the dtype of v.
        C: the state after the last token, (B, H, K, V) or (n, H, K, V), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: O(B T H (K V + 32 (K + V + 32))) operations by chunks of 32. Sums and states are float32 at least.
    Source: arXiv 2506.11997, on a path graph. With M = T and D = S the mark reads C_t: gated linear attention.
    """
    call = _begin(q, k, v, source, transition, mark, direct, cu_seqlens=cu_seqlens, backend=backend)
    state, scale = call.state(state, "H K V"), q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, source, transition, mark, direct)

    if shard.current() is not None:
        element = _element(*call.last_document(k, v, source, transition))
        state = shard.incoming_state(element, state, call.several, inputs=inputs)
    if call.backend == "reference":
        return each_document(lambda *each: plstm_reference(*each, scale=scale), call.cuts, inputs, state)
    if call.one_token:
        return plstm_step(*inputs, state, scale)
    if not call.length:  # an empty stretch still hangs on what arrived from other ranks
        return shard.tied(v, *inputs, state), state
    return plstm_chunked(*inputs, state, scale, call.cuts)


@dispatch.keeps_its_precision
def plstm_summary(
    k: Tensor, v: Tensor, source: Tensor, transition: Tensor, *, cu_seqlens: Tensor | None = None
) -> Elementwise:
    """What a stretch of time does to any state: C -> a C + b.

    Args:
        k, v, source, transition: as for `plstm`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a (B, H, 1, 1) and b (B, H, K, V), float32 (float64 for float64 inputs); `apply` gives the final state.

    Cost: one run over the last document. Differentiable.
    """
    call = _begin(k, k, v, source, transition, source, source, cu_seqlens=cu_seqlens, name="plstm_summary")
    return call.bordered(_element(*call.last_document(k, v, source, transition)))


def _begin(
    q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, cu_seqlens: Tensor | None, backend: str = "auto", name: str = ""
) -> Call:
    """The checked call of the operator, or of its summary."""
    args = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V")}
    args |= {gate: (x, "B T H") for gate, x in zip(GATES, gates, strict=True)}
    return OPERATOR.begin(args, alike=("q", "k", "v"), cu_seqlens=cu_seqlens, backend=backend, name=name)


def _element(k: Tensor, v: Tensor, source: Tensor, transition: Tensor) -> Elementwise:
    """The product of the transitions, and the state that comes of none before."""
    dtype = dispatch.state_dtype(k)
    a = transition.to(dtype).prod(dim=1)[..., None, None]
    empty = a.new_zeros(*a.shape[:2], k.shape[-1], v.shape[-1])
    if not k.shape[1]:
        return Elementwise(a, empty)
    nothing = k.new_zeros(k.shape), source.new_zeros(source.shape)
    b = plstm_chunked(nothing[0], k, v, source, transition, nothing[1], nothing[1], empty, 1.0, None)[1]
    return Elementwise(a, b)
