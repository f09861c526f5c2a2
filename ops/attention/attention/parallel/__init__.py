"""Softmax attention over a sequence that is cut across ranks: exact by every method, forward and backward.

| file | its one idea |
|---|---|
| `view.py` | who sees whom: a mask is one interval of keys for each query, whatever the layout |
| `local.py` | one block on this rank, forward and backward, and the sum of blocks |
| `crossing.py` | what every method has |
| `gathered.py` | "allgather", and for windows in a contiguous layout only the keys they reach |
| `by_labels.py` | any `Visible`, by an all-gather |
| `ring.py` | "ring", "zigzag", "striped": keys go round |
| `heads.py` | "ulysses", "usp": heads are shared out among neighbours, which form a ring |
| `visits.py`, `tokenring.py` | "tokenring": queries go round, answers come home |
| `lightseq.py` | "lightseq": early ranks help late ones |

Elements that a rank receives, of c tokens, H query and Hk key heads of size d. Those marked * are float32 (float64 for
float64 inputs) in any dtype of inputs: partial results, sums of gradients, one number a query. W is window - 1.

| method | forward | backward |
|---|---|---|
| allgather; ring, zigzag, striped | 2 (P-1) c Hk d | 2 (P-1) c Hk d + 2 (P-1) c Hk d * |
| with a window, contiguous | 2 W Hk d | 2 W Hk d + 2 W Hk d * |
| ulysses, Hk' = max(Hk, P) | (P-1)/P c ((2 H + 2 Hk') d + H *) | the same |
| usp, U = inner | ulysses with U for P, and a ring of P/U with c U tokens and Hk'/U heads | the same |
| tokenring, all rows | (P-1) c H (d + (d + 1) *) | (P-1) c H (2 d + (d + 2) *) |
| lightseq, keys fetched | 2 c Hk d | 2 c Hk d + 2 c Hk d * |
| lightseq, a helped block | c H (d + (d + 1) *) | c H (2 d + (d + 2) *) |

Of lightseq's P (P - 1) / 2 blocks, n = sum of P - t over t = 1 ... P // 2 fetch keys and the others are helped with.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.attention.attention.parallel.by_labels import ByLabels
from zoo.ops.attention.attention.parallel.crossing import Crossing
from zoo.ops.attention.attention.parallel.gathered import Gathered, Reached
from zoo.ops.attention.attention.parallel.heads import Heads
from zoo.ops.attention.attention.parallel.lightseq import LightSeq
from zoo.ops.attention.attention.parallel.ring import Ring
from zoo.ops.attention.attention.parallel.tokenring import TokenRing
from zoo.ops.attention.attention.parallel.view import view
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.core import check
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.dispatch import state_dtype
from zoo.ops.shard import positions
from zoo.ops.shard.scope import Scope
from zoo.ops.shard.sequence_shard import SequenceShard

WAYS: dict[str, type[Crossing]] = {
    "allgather": Gathered,
    "ring": Ring,
    "zigzag": Ring,
    "striped": Ring,
    "tokenring": TokenRing,
    "lightseq": LightSeq,
}
HEADS = ("ulysses", "usp")


def attention_across(
    active: Scope, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float,
    visible: Visible | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of this rank's queries to the keys of all ranks: o (B, T, H, V) and lse (B, T, H).

    Arguments are those of zoo.ops.attention, of this rank's own tokens, in shapes that were checked. A `visible` has
    labels of the own queries and intervals of the own keys.

    Raises:
        ValueError: the shard does not hold what came, or its method cannot take it.
    """
    crossing = _crossing(active.shard, q, k, causal, window, scale, visible)
    result: tuple[Tensor, Tensor] = apply(_Across, active, crossing, q, k, v)
    return result


def _crossing(
    shard: SequenceShard, q: Tensor, k: Tensor, causal: bool, window: int | None, scale: float, visible: Visible | None
) -> Crossing:
    name, layout = shard.attention, shard.layout or "contiguous"
    positions(shard, q.shape[1])  # refuses what the rank does not hold
    if shard.chunk > 1:
        raise ValueError(f"attention across ranks needs even stretches; got cuts at chunks of {shard.chunk}, use 1")
    length = q.shape[1] * shard.size if shard.length is None else shard.length
    if visible is not None:
        if name != "allgather" or shard.documents is not None:
            beside = f"attention {name!r}" if name != "allgather" else "documents of the shard"
            raise ValueError(
                "attention across ranks takes visible by 'allgather', with documents said by visible itself; got "
                f"{beside}, use 'allgather' and Visible.documents"
            )
        return ByLabels(shard, view(length, shard.size, layout, None, False, None, 1), scale, visible)
    if shard.documents is not None:
        check.boundaries("attention across ranks", torch.tensor(shard.documents), q.shape[0], length)
    if window is not None and window >= length:
        window = None
    if name == "lightseq" and (layout != "contiguous" or not causal):
        raise ValueError(
            "attention 'lightseq' shares out the causal work of contiguous stretches; "
            f"got layout {layout!r}, causal={causal}, use another method such as 'ring' or 'allgather'"
        )
    inner = _inner(shard, q.shape[2])
    seen = view(length, shard.size, layout, shard.documents, causal, window, inner)
    if name in HEADS:
        return Heads(shard, seen, scale, (q.shape[2], k.shape[2]))
    if window is not None and layout == "contiguous":
        return Reached(shard, seen, scale)
    return WAYS[name](shard, seen, scale)


def _inner(shard: SequenceShard, heads: int) -> int:
    """How many neighbouring ranks share out heads."""
    if shard.attention not in HEADS:
        return 1
    inner = shard.size if shard.attention == "ulysses" else shard.inner
    if inner is None:
        raise ValueError(
            "attention 'usp' must know how many neighbouring ranks share out heads; give SequenceShard inner, a "
            f"divisor of its {shard.size} ranks"
        )
    if heads < inner:
        raise ValueError(
            f"attention {shard.attention!r} needs at least one query head for each of {inner} ranks; got {heads}, use "
            "'usp' with a smaller inner, or another method such as 'ring'"
        )
    return inner


class _Across(torch.autograd.Function):
    """One node for all that crosses: its forward is never run again by a recomputation, which reads (o, lse) back."""

    @staticmethod
    def forward(ctx: Any, active: Scope, crossing: Crossing, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def attend() -> tuple[Tensor, Tensor]:
            o, lse = crossing.forward(q, k, v)
            return o.to(q.dtype), lse

        o, lse = active.arrivals(attend)
        ctx.crossing, ctx.dtypes = crossing, (q.dtype, k.dtype, v.dtype)
        # what is recomputed must save what was saved, and a recomputation has nothing that was kept
        ctx.save_for_backward(o, lse, *((q, k, v) if active.tape.recomputes or not crossing.kept else crossing.kept))
        crossing.kept = ()
        return o, lse

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        o, lse, *inputs = ctx.saved_tensors
        wide = state_dtype(o)
        blind = lse == float("-inf")
        D = ((do.to(wide) * o.to(wide)).sum(-1) - dlse.to(wide)).masked_fill(blind, 0.0)
        gradients = ctx.crossing.backward(inputs, do, D, lse.masked_fill(blind, float("inf")))
        return None, None, *(dx.to(dtype) for dx, dtype in zip(gradients, ctx.dtypes, strict=True))
