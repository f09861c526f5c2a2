"""The chunked form of one stretch of a sequence that is cut across ranks: everything is prepared once.

What a stretch does to any state, and what it does to the state that arrives, are the same recurrence over the same
chunks; so are the gradient that goes on to earlier ranks and that of the stretch itself. As two calls of the chunked
form they would each make products and triangular inverses of their own.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.algebra import Matrix
from zoo.ops.core.autograd import apply
from zoo.ops.core.chunks import ChunkedTime
from zoo.ops.core.differentiation import first_order
from zoo.ops.linear_attention.delta_rule.chunked import (
    SEGMENT,
    Queries,
    chunk_size,
    gradients,
    keys,
    pull_back,
    queries,
    run,
    run_again,
    run_back,
    run_wide,
)
from zoo.ops.shard import Crossing


def delta_rule_across(
    crossing: Crossing, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float,
    cuts: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `delta_rule_chunked`, where S0 is what the caller knows and `crossing` brings the rest."""
    result: tuple[Tensor, Tensor] = apply(_Across, crossing, q, k, v, beta, g, S0, scale, cuts)
    return result


class _Across(torch.autograd.Function):
    """Saved for the backward: the inputs, the transition, and X, U and the states before each range of positions."""

    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor,
        scale: float, cuts: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (B, T, H, K), V = q.shape, v.shape[-1]
        time = ChunkedTime(B, T, chunk_size(T, cuts), cuts, q.device)
        segments = time.segments(SEGMENT, H * max(K, V))
        prepared = [keys(time, positions, S0.dtype, k, v, beta, g) for positions in segments]
        inverses, writes = [p.inverse() for p in prepared], [p.beta * p.v for p in prepared]
        starts: list[Tensor] = []
        befores: list[Tensor] = []
        last = S0

        def element() -> Matrix:
            state = S0 if cuts is None else S0[-1:]
            identity = Matrix.identity(torch.zeros_like(state))
            S = torch.cat([identity.b, identity.M], dim=-1).flatten(0, 1)
            for positions, p, X, U in zip(segments, prepared, inverses, writes, strict=True):
                run_wide(p, X, U, S, _rows(time, positions, H, None if cuts is None else len(cuts) - 2))
            b, M = S.unflatten(0, (-1, H)).split([V, K], dim=-1)
            return Matrix(M, b)

        def through(states: Tensor) -> Tensor:
            nonlocal last
            S = time.order(states).flatten(0, 1).clone()
            for positions, p, X, U in zip(segments, prepared, inverses, writes, strict=True):
                starts.append(S.clone())
                befores.append(run(p, X, U, S, time.rows(positions, H)))
            last = time.unorder(S.unflatten(0, (-1, H)))
            return last

        reads: list[Queries] = []

        def read() -> None:
            for positions, p in zip(segments, prepared, strict=True):
                reads.append(queries(time, positions, S0.dtype, q, p, scale))

        transition = crossing.forward(S0, element, through, read)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for positions, r, before, U in zip(segments, reads, befores, writes, strict=True):
            time.put(out, r.output(before, U).unflatten(0, (-1, H)), positions)
        ctx.save_for_backward(q, k, v, beta, g, transition, *inverses, *writes, *starts)
        ctx.crossing, ctx.time, ctx.scale, ctx.segments, ctx.packed = crossing, time, scale, segments, cuts is not None
        return out, last

    @staticmethod
    @first_order("delta_rule")
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, transition, *kept = ctx.saved_tensors
        time, H, n = ctx.time, q.shape[2], len(ctx.segments)
        inverses, writes, starts = kept[:n], kept[n : 2 * n], kept[2 * n :]
        prepared, asked = [], []
        for positions in ctx.segments:
            p = keys(time, positions, dS.dtype, k, v, beta, g)
            r = queries(time, positions, dS.dtype, q, p, ctx.scale)
            do_ = time.part(do, positions, dS.dtype)
            prepared.append((p, r, do_))
            asked.append(r.asked(do_))
        states_back: list[tuple[Tensor, Tensor]] = []

        def pull() -> Tensor:
            d = (dS[:1] if ctx.packed else dS).flatten(0, 1).clone()
            for i in reversed(range(n)):
                rows = _rows(time, ctx.segments[i], H, 0 if ctx.packed else None)
                pull_back(prepared[i][0], inverses[i], *asked[i], d, rows)
            dafter: Tensor = d.unflatten(0, (-1, H))
            return dafter

        def back(dafter: Tensor) -> Tensor:
            d = time.order(dafter).flatten(0, 1).clone()
            for i in reversed(range(n)):
                rows = time.rows(ctx.segments[i], H)
                states_back.insert(0, run_back(prepared[i][0], inverses[i], *asked[i], d, rows))
            dbefore: Tensor = time.unorder(d.unflatten(0, (-1, H)))
            return dbefore

        befores: list[Tensor] = []

        def again() -> None:
            for (p, _, _), U, S, positions in zip(prepared, writes, starts, ctx.segments, strict=True):
                befores.append(run_again(p, U, S.clone(), time.rows(positions, H)))

        dS0 = ctx.crossing.backward(transition, dS, pull, back, again)
        inputs = (q, k, v, beta, g)
        grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for i, (p, r, do_) in enumerate(prepared):
            for out, y in zip(grads, gradients(p, r, writes[i], befores[i], do_, *states_back[i]), strict=True):
                if out is not None and y is not None:
                    time.put(out, y.unflatten(0, (-1, H)), ctx.segments[i])
        return None, *grads, dS0, None, None


def _rows(time: ChunkedTime, positions: tuple[int, int], heads: int, document: int | None) -> list[slice]:
    """Of one document, or of all rows of a batch."""
    return time.rows(positions, heads) if document is None else time.rows_of(document, positions, heads)
