"""Memories that learn at test time: networks whose weights are the state of a sequence (Miras, Titans, TTT, LaCT).

| file | its one idea |
|---|---|
| `memory.py` | the network, and the rank-one factors of its gradients |
| `loss.py` | the attentional bias: the inner loss and its gradient |
| `retention.py` | how weights follow from the accumulator that updates change |
| `algorithm.py` | what becomes of gradients before they reach it |
| `rule.py` | these four choices and the chunk |
| `state.py` | what is carried from token to token |
| `reference.py` | the definition: a loop over tokens with torch.func.grad |
| `chunk_slots.py` | time as chunks, wherever an earlier call ended |
| `chunked.py` | the dual form |
| `across.py` | the state from rank to rank |
"""

# ruff: noqa: PT028 - the operator's name begins like a test's

from typing import Any

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.memories.test_time_memory.across import from_rank_to_rank, packed, unpacked
from zoo.ops.memories.test_time_memory.algorithm import GradientDescent, Momentum, Muon
from zoo.ops.memories.test_time_memory.chunked import memory_chunked
from zoo.ops.memories.test_time_memory.loss import DotProductLoss, HuberLoss, KLLoss, L2Loss, LpLoss
from zoo.ops.memories.test_time_memory.memory import GatedMLPMemory, MatrixMemory, MLPMemory, Norm
from zoo.ops.memories.test_time_memory.reference import Tokens, memory_reference
from zoo.ops.memories.test_time_memory.retention import (
    ElasticRetention,
    LqRetention,
    MirrorRetention,
    RowNormRetention,
    SoftmaxRetention,
    WeightDecay,
)
from zoo.ops.memories.test_time_memory.rule import MemoryRule
from zoo.ops.memories.test_time_memory.state import MemoryState, first_state, zero_state

__all__ = [
    "DotProductLoss", "ElasticRetention", "GatedMLPMemory", "GradientDescent", "HuberLoss", "KLLoss", "L2Loss",
    "LpLoss", "LqRetention", "MLPMemory", "MatrixMemory", "MemoryRule", "MemoryState", "MirrorRetention", "Momentum",
    "Muon", "RowNormRetention", "SoftmaxRetention", "WeightDecay", "first_state", "test_time_memory",
]  # fmt: skip

OPERATOR = Operator(
    "test_time_memory",
    cp_kind="serial",
    forms=("torch",),
    no_kernels="its work is products of matrices in chunks, which torch's own kernels make",
)


@OPERATOR.public()
def test_time_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    g: Tensor | None = None,
    theta: Tensor | None = None,
    delta: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    start: tuple[Tensor, ...] | None = None,
    state: MemoryState | None = None,
    *,
    rule: MemoryRule,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Run A_t = exp(g_t) A_{t-1} - eta_t grad loss(M(k_t; W), v_t), W_t = W(A_t), y_t = M(q_t; W_t) along time.

    Gradients are taken at the weights W at the beginning of t's chunk. Chunks are counted from the beginning of a
    sequence or document. Behind its last token a chunk is learnt at once, so the state never holds a full one.

    Args:
        q, k: queries and keys, (B, T, H, K), of one float dtype with v. Used as they come: normalise before.
        v: values, (B, T, H, V).
        eta: step size per token and head, (B, T, H), >= 0. With unit keys, l2 and a matrix, eta < 2 is stable.
        g: log decay of the accumulator, (B, T, H), <= 0; 0 when omitted.
        theta: log decay of the running sum of gradients, (B, T, H), <= 0; with the algorithm Momentum alone.
        delta: threshold of the loss, (B, T, H), > 0; with HuberLoss alone. The gates may have a wider dtype than q.
        gain, offset: of the norm of the memory's output, (H, V); 1 and 0 when omitted. Learnt slowly, not a state.
        start: the accumulators at which a sequence begins, (H, out, in) as `rule.memory.shapes(K, V)` says; zeros when
            omitted, and a network of zeros never learns. For weights W they are `rule.retention.start(W)`.
        state: before the first token, in the place of `start`; with packed documents it has n rows.
        rule: memory, loss, retention, algorithm and chunk, a `MemoryRule`.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" and "torch" are the chunked form, "reference" is the loop over tokens.

    Returns:
        y: (B, T, H, V), in the dtype of v.
        last: the state after the last token, float32 (float64 for float64 inputs); feed it back as `state`.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a gate is missing or not read, K and V differ under a residual,
            or the backend cannot run here.

    Cost: per token and head about 14 V E operations for an MLP of E inner units, twice as much backward; one
        sequential step a chunk. Accumulates in float32. The state has V E + E K numbers a head, and the open chunk.
    Source: arXiv 2504.13173 (Miras), 2501.00663 (Titans), 2407.04620 (TTT), 2505.23884 (LaCT).
    """
    given = {"eta": eta, "g": g, "theta": theta, "delta": delta}
    args = {
        "q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"),
        **{name: (x, "B T H") for name, x in given.items()}, "gain": (gain, "H V"), "offset": (offset, "H V"),
    }  # fmt: skip
    here = shard.current()
    over_heads = here is not None and here.method == "heads" and here.size > 1
    local = None if over_heads else cu_seqlens  # boundaries are checked by the call on slices of heads
    call = OPERATOR.begin(args, alike=("q", "k", "v"), cu_seqlens=local, backend=backend)
    _refuse(rule, given, gain is not None or offset is not None, call.sizes)
    if over_heads:
        return _over_heads(rule, q, k, v, eta, given, gain, offset, start, state, cu_seqlens, backend)
    begun = state is not None
    state = _state(call, rule, start, state)
    each = (given[name] for name in rule.gates)
    gates = tuple(torch.zeros_like(eta, dtype=call.dtype) if x is None else x.to(call.dtype) for x in each)
    tokens = Tokens(q.to(call.dtype), k.to(call.dtype), v.to(call.dtype), gates)
    norm = Norm(*(None if x is None else x.to(call.dtype) for x in (gain, offset)))

    def form(tokens: Tokens, norm: Norm, state: MemoryState) -> tuple[Tensor, MemoryState]:
        return _form(call, rule, tokens, norm, state, begun)

    if here is None or here.size == 1:
        y, last = form(tokens, norm, state)
    else:
        begun = True  # another rank may have begun a chunk
        y, last = from_rank_to_rank(form, tokens, norm, state, call.cuts)
        y = shard.tied(y, *(start or ()))  # ranks that share it wait for a gradient, if only of zeros
    return y.to(v.dtype), last


def _form(
    call: Call, rule: MemoryRule, tokens: Tokens, norm: Norm, state: MemoryState, begun: bool
) -> tuple[Tensor, MemoryState]:
    """Checked arguments, without a shard; some or all heads of the call."""
    if not call.length:  # the output stays in the graph: other ranks wait for its backward pass
        floats = (*tokens.gates, *norm, *state.weights, *state.momentum, state.chunk)
        return shard.tied(tokens.v, tokens.q, tokens.k, *floats), state
    if call.backend != "reference":
        return memory_chunked(rule, tokens, norm, state, call.cuts, begun)

    def loop(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, MemoryState]:
        *gates, before = rest
        return memory_reference(rule, Tokens(q, k, v, tuple(gates)), norm, before)

    q, k, v, gates = tokens
    return each_document(loop, call.cuts, (q, k, v, *gates), state)


def _refuse(rule: MemoryRule, given: dict[str, Tensor | None], learnt: bool, sizes: dict[str, int]) -> None:
    """What the rule does not read is not given, and what it needs is."""
    for name, x in given.items():
        if x is None and name in rule.gates and name != "g":
            raise ValueError(f"test_time_memory: this rule reads the gate {name}; got None, pass {name} (B, T, H)")
        if x is not None and name not in rule.gates:
            raise ValueError(
                f"test_time_memory: {name} must be left out where nothing reads it; got {name} with the loss "
                f"{type(rule.loss).__name__} and the algorithm {type(rule.algorithm).__name__}"
            )
    if learnt and not rule.memory.norm:
        raise ValueError(
            "test_time_memory: gain and offset belong to the memory's norm; got a memory without a norm, leave them out"
        )
    if rule.memory.residual and sizes["K"] != sizes["V"]:
        raise ValueError(
            f"test_time_memory: a residual adds keys to values, so K and V must agree; got K = {sizes['K']} and "
            f"V = {sizes['V']}, use a memory with residual=False"
        )


def _state(
    call: Call, rule: MemoryRule, start: tuple[Tensor, ...] | None, given: MemoryState | None
) -> MemoryState:  # fmt: skip
    """The state before the first token, checked; that of the start, or zeros, when none is given."""
    H, K, V = (call.sizes[name] for name in "HKV")
    shapes = rule.memory.shapes(K, V)
    wanted = [(H, *shape) for shape in shapes]
    if start is not None and [tuple(x.shape) for x in start] != wanted:
        raise ValueError(
            f"test_time_memory: start must be {len(shapes)} tensors {wanted}, heads, outputs, inputs of a matrix; got "
            f"{[tuple(x.shape) for x in start]}"
        )
    if given is None and start is not None:
        return first_state(rule, tuple(x.to(call.dtype) for x in start), call.documents, K, V)
    if given is None:
        like = call.state(None, "H")
        return zero_state(rule, call.documents, H, K, V, dtype=call.dtype, device=like.device)
    weights, momentum, chunk, filled = given
    sums = len(shapes) if rule.algorithm.momentum else 0
    if (len(weights), len(momentum)) != (len(shapes), sums):
        raise ValueError(
            f"test_time_memory: the state of this rule has {len(shapes)} matrices and {sums} running sums; got "
            f"{len(weights)} and {len(momentum)}, pass a state of the same rule"
        )
    if filled.dtype != torch.int64 or filled.shape != (call.documents,):
        raise ValueError(
            f"test_time_memory: filled must be (n,) int64 with n = {call.documents}; got {tuple(filled.shape)} "
            f"{filled.dtype}, pass the state that a call returned"
        )
    made = [
        [call.state(x, "H O I", O=rows, I=columns) for x, (rows, columns) in zip(kept, shapes, strict=False)]
        for kept in (weights, momentum)
    ]
    chunk = call.state(chunk, "H C F", C=rule.chunk_size, F=K + V + len(rule.gates))
    free = torch.arange(rule.chunk_size, device=filled.device) >= filled[:, None]
    chunk = chunk.masked_fill(free[:, None, :, None], 0)  # whatever stands there
    return MemoryState(tuple(made[0]), tuple(made[1]), chunk, filled)


def _over_heads(
    rule: MemoryRule, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, given: dict[str, Tensor | None],
    gain: Tensor | None, offset: Tensor | None, start: tuple[Tensor, ...] | None, state: MemoryState | None,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """Slices of time become slices of heads, and the state never travels."""
    K, V = k.shape[3], v.shape[3]
    like = zero_state(rule, 1, 1, K, V, dtype=torch.float32, device=q.device)
    shapes = rule.memory.shapes(K, V)
    sizes = [rows * columns for rows, columns in shapes]

    def by_heads(
        q: Tensor, k: Tensor, v: Tensor, eta: Tensor, g: Tensor | None, theta: Tensor | None, delta: Tensor | None,
        gain: Tensor | None, offset: Tensor | None, start: Tensor | None, state: Tensor | None, *,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own = None if state is None else unpacked(state, like)
        begin = (
            None
            if start is None
            else tuple(x.unflatten(1, s) for x, s in zip(start.split(sizes, 1), shapes, strict=True))
        )
        y, last = test_time_memory(
            q, k, v, eta, g, theta, delta, gain, offset, begin, own, rule=rule, cu_seqlens=cu_seqlens, backend=backend
        )
        return y, packed(last)

    by_heads.__name__ = OPERATOR.name
    split = dict.fromkeys(("q", "k", "v", *given), 2) | dict.fromkeys(("gain", "offset", "start"), 0)
    begin = None if start is None else torch.cat([x.flatten(1) for x in start], dim=1)
    flat = None if state is None else packed(state)
    g, theta, delta = (given[name] for name in ("g", "theta", "delta"))
    y, last = shard.over_heads(split=split)(by_heads)(
        q, k, v, eta, g, theta, delta, gain, offset, begin, flat, cu_seqlens=cu_seqlens
    )
    return y, unpacked(last, like)
