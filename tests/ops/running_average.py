"""A small operator that the harness proves beside the registered ones: its state is a tree with an integer leaf.

y_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i): softmax attention with one query, as Aaren has it. It crosses
ranks by `shard.incoming_fold`, for which there is no registered operator yet.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.algebra import LogSumExp
from zoo.ops.core.packing import last_document
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn


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


class Closed(NamedTuple):
    """The element of a stretch in which another document begins: whatever arrives ends there."""

    value: Average

    def apply(self, state: Average) -> Average:
        return self.value


def running_average(
    s: Tensor, v: Tensor, state: Average | None = None, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Average]:
    """s (B, T, H) and v (B, T, H, V) -> y (B, T, H, V), and the state after the last step."""
    name = "running_average"
    sizes = check.shapes(name, {"s": (s, "B T H"), "v": (v, "B T H V")})
    check.same_dtype(name, s=s, v=v)
    B, T, H, V = (sizes[dim] for dim in "BTHV")
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, B, T)
    chosen, dtype = dispatch.resolve(name, backend, s), dispatch.state_dtype(s)
    wide_s, wide_v = s.to(dtype), v.to(dtype)
    n = B if cuts is None else len(cuts) - 1
    if state is None:
        w = torch.zeros(n, H, V, dtype=dtype, device=s.device)
        state = Average(LogSumExp.identity(w), torch.zeros(n, dtype=torch.int64, device=s.device))
    several = cuts is not None and len(cuts) > 2
    state = shard.incoming_fold(
        Average.then, element(*last_document(cuts, wide_s, wide_v)), state, several, inputs=(s, v)
    )
    outputs, states = [], []
    for i, (left, right) in enumerate(itertools.pairwise(cuts or (0, T))):
        own = state if cuts is None else tree_map(lambda x, i=i: x[i : i + 1], state)
        form = loop if chosen == "reference" else pairs
        y, after = form(wide_s[:, left:right], wide_v[:, left:right], own)
        outputs.append(shard.tied(y, *own.total) if left == right else y)
        states.append(after)
    joined = tree_map(lambda *rows: torch.cat(rows), *states)
    return torch.cat(outputs, dim=1).to(v.dtype), joined


def element(s: Tensor, v: Tensor) -> Average:
    """Of a whole stretch: the largest score, and sums over it."""
    seen = torch.full((s.shape[0],), s.shape[1], device=s.device)
    if not s.shape[1]:
        w = v.new_zeros(v.shape[0], *v.shape[2:])
        return Average(LogSumExp.identity(w), seen)
    m = s.amax(1)
    e = (s - m.unsqueeze(1)).exp()
    return Average(LogSumExp(m, e.sum(1), torch.einsum("bth,bthv->bhv", e, v)), seen)


def summary(i: Inputs, cu: Tensor | None) -> Average | Closed:
    cuts = None if cu is None else tuple(cu.tolist())
    last = element(*last_document(cuts, i["s"], i["v"]))
    return last if cuts is None or len(cuts) == 2 else Closed(last)


def loop(s: Tensor, v: Tensor, state: Average) -> tuple[Tensor, Average]:
    """The definition, one step at a time."""
    outputs = [v[:, :0]]
    for s_t, v_t in zip(s.unbind(1), v.unbind(1), strict=True):
        state = state.then(Average(LogSumExp(s_t, torch.ones_like(s_t), v_t), torch.ones_like(state.seen)))
        outputs.append((state.total.w / state.total.u.unsqueeze(-1)).unsqueeze(1))
    return torch.cat(outputs, dim=1), state


def pairs(s: Tensor, v: Tensor, state: Average) -> tuple[Tensor, Average]:
    """All pairs of steps at once, and the state beside them."""
    T = s.shape[1]
    if not T:
        return v, state.then(element(s, v))
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
    empty=Average.empty,  # type: ignore[arg-type]  # one kind of state, as it made it
    sizes=({"H": 2, "V": 3},),
    time=("s", "v"),
    extremes={
        # without ties: where two scores are the largest, the derivative of m is anybody's
        "weak scores": lambda i: i | {"s": i["s"] * 1e-3},
        "scores of hundreds": lambda i: i | {"s": i["s"] * 300},
    },
    cp_kind="reduce",
    summary=summary,
    forms=("torch",),
)
