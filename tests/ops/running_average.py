"""A small operator that the harness proves beside the registered ones: its state is a tree with an integer leaf.

y_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i): softmax attention with one query, as Aaren has it. It crosses
ranks by `shard.incoming_fold`, for which there is no registered operator yet. docs/adding_an_operator.md shows parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.algebra import Closed, LogSumExp
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document, last_document
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn

OPERATOR = Operator("running_average", cp_kind="reduce", forms=("torch",), no_kernels="it is an operator of the tests")


class Average(NamedTuple):
    """What a stretch of time makes of the state before it, and the state itself.

    total: m and u (B, H), w (B, H, V); seen: tokens, (B,) int64.
    """

    total: LogSumExp
    seen: Tensor

    @classmethod
    def empty(cls, state: "Average") -> "Average":
        return cls(LogSumExp.identity(state.total.w), torch.zeros_like(state.seen))

    def then(self, second: "Average", /) -> "Average":
        return Average(self.total.then(second.total), self.seen + second.seen)

    def apply(self, state: "Average") -> "Average":
        return state.then(self)


@OPERATOR.public()
def running_average(
    s: Tensor, v: Tensor, state: Average | None = None, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Average]:
    """s (B, T, H) and v (B, T, H, V) -> y (B, T, H, V), and the state after the last step."""
    args = {"s": (s, "B T H"), "v": (v, "B T H V")}
    call = OPERATOR.begin(args, alike=("s", "v"), cu_seqlens=cu_seqlens, backend=backend)
    state = before(call, state)
    wide = s.to(call.dtype), v.to(call.dtype)
    if shard.current() is not None:
        own = element(*call.last_document(*wide))
        state = shard.incoming_fold(Average.then, own, state, call.several, inputs=(s, v))
    if not call.length:
        return shard.tied(v, s, *state.total), state  # every argument, and what arrived: other ranks wait for both
    y, last = each_document(loop if call.backend == "reference" else pairs, call.cuts, wide, state)
    return y.to(v.dtype), last


def before(call: Call, state: Average | None) -> Average:
    """The state before the first token: what was given, checked, or what saw nothing."""
    if state is None:
        w = call.state(None, "H V")
        return Average(LogSumExp.identity(w), torch.zeros(call.documents, dtype=torch.int64, device=w.device))
    (m, u, w), seen = state
    return Average(LogSumExp(call.state(m, "H"), call.state(u, "H"), call.state(w, "H V")), seen)


def element(s: Tensor, v: Tensor) -> Average:
    """Of a whole stretch: the largest score, and sums over it."""
    seen = torch.full((s.shape[0],), s.shape[1], device=s.device)
    if not s.shape[1]:
        w = v.new_zeros(v.shape[0], *v.shape[2:])
        return Average(LogSumExp.identity(w), seen)
    m = s.amax(1)
    e = (s - m.unsqueeze(1)).exp()
    return Average(LogSumExp(m, e.sum(1), torch.einsum("bth,bthv->bhv", e, v)), seen)


def summary(i: Inputs, cu: Tensor | None) -> Average | Closed[Average]:
    cuts = None if cu is None else tuple(cu.tolist())
    last = element(*last_document(cuts, i["s"], i["v"]))
    return last if cuts is None or len(cuts) == 2 else Closed(last)


def loop(s: Tensor, v: Tensor, state: Average) -> tuple[Tensor, Average]:
    """The definition, one step at a time."""
    outputs = []
    for s_t, v_t in zip(s.unbind(1), v.unbind(1), strict=True):
        state = state.then(Average(LogSumExp(s_t, torch.ones_like(s_t), v_t), torch.ones_like(state.seen)))
        outputs.append((state.total.w / state.total.u.unsqueeze(-1)).unsqueeze(1))
    return torch.cat(outputs, dim=1), state


def pairs(s: Tensor, v: Tensor, state: Average) -> tuple[Tensor, Average]:
    """All pairs of steps at once, and the state beside them."""
    T = s.shape[1]
    scores = s.transpose(1, 2).unsqueeze(2).expand(-1, -1, T, -1)  # (B, H, T, T)
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=s.device).tril(), float("-inf"))
    m = torch.maximum(scores.amax(-1), state.total.m.unsqueeze(-1))
    e, before = (scores - m.unsqueeze(-1)).exp(), (state.total.m.unsqueeze(-1) - m).exp()
    top = e @ v.transpose(1, 2) + before.unsqueeze(-1) * state.total.w.unsqueeze(2)
    y = top / (e.sum(-1) + before * state.total.u.unsqueeze(-1)).unsqueeze(-1)
    return y.transpose(1, 2), state.then(element(s, v))


def make(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {"s": randn(generator, B, T, sizes["H"]), "v": randn(generator, B, T, sizes["H"], sizes["V"])}


def random_state(n: int, sizes: Sizes, generator: torch.Generator) -> Average:
    m, w = randn(generator, n, sizes["H"]), randn(generator, n, sizes["H"], sizes["V"])
    return Average(LogSumExp(m, 1 + randn(generator, n, sizes["H"]).abs(), w), torch.arange(n))


SPEC = OperatorSpec(
    name="running_average",
    function=running_average,
    make=make,
    state=random_state,
    empty=Average.empty,
    sizes=({"H": 2, "V": 3},),
    time=("s", "v"),
    extremes={
        # without ties: where two scores are the largest, the derivative of m is anybody's
        "weak scores": lambda i: i | {"s": i["s"] * 1e-3},
        "scores of hundreds": lambda i: i | {"s": i["s"] * 300},
    },
    summary=summary,
)
