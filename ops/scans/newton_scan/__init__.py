"""Nonlinear recurrences in parallel over time: Newton's method, each step of which is an affine scan."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.autograd import apply
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.differentiation import first_order
from zoo.ops.core.packing import each_document
from zoo.ops.scans.affine_scan import affine_scan
from zoo.ops.scans.block_affine_scan import block_affine_scan
from zoo.ops.scans.newton_scan.cell import Cell, Linearised
from zoo.ops.scans.newton_scan.solve import (
    Edges,
    Problem,
    announce,
    before,
    entering,
    newton,
    scan_back_,
    solved,
    stacked,
    state_planes,
    walk,
    windowed,
)

__all__ = ["Cell", "Linearised", "newton_corrections", "newton_residual", "newton_scan"]

# Numbers of state in one step of time from which on walking on a CPU is no slower than Newton: a step is then worth its
# calls, and Newton does four times the arithmetic. One Xeon core, float32, T=2048, forward + backward by Newton / by
# walking, ms: ParaGRU, B D = 64: 14/51, 256: 41/62, 384: 57/67, 640: 90/81, 2048: 291/161; ParaLSTM 64: 31/69, 256:
# 96/89, 384: 131/100, 2048: 601/245.
WIDE = 512
# Numbers of a plane that are worked on at once, so that the dozen planes of a cell stay in the cache. The same machine,
# forward + backward at 16k, 32k, 64k, 128k, 256k, ms: ParaGRU B=1 D=256 T=2048 67, 56, 45, 58, 55; B=8 D=256 T=2048
# 259, 223, 202, 302, 280; B=1 D=64 T=8192 81, 85, 64, 62, 69; ParaLSTM B=8 D=256 T=2048 406, 373, 355, 514, 473.
CACHED = 65536


OPERATOR = Operator(
    "newton_scan", cp_kind="affine", forms=["torch"], no_kernels="a cell in Python has no kernels"
)  # fmt: skip


@OPERATOR.public()
def newton_scan(
    cell: Cell,
    u: Tensor,
    w: Sequence[Tensor],
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    iterations: int | None = None,
    window: int | None = None,
    return_residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Run h_t = f(h_{t-1}, u_t) along time for a cell whose channels do not mix, in parallel over time.

    Args:
        cell: f, see `zoo.ops.newton_scan.Cell`; its Jacobian and gradients are autograd's where it gives none.
        u: what enters the gates, (B, T, G, D), any float dtype.
        w: parameters of the cell, (D,) each, of u's dtype or float32.
        state: h before the first step, (B, D), or (B, D, 2) for a cell with two numbers a channel; zeros when omitted.
            With packed documents (n, D) or (n, D, 2).
        resets: (B, T) bool, or None: where true, a new episode begins and the state before the step is dropped.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        iterations: Newton steps, all made and none checked; None: as many as it takes (see Returns).
        window: steps of time that Newton solves at once, one window after the other; None: as many as stay in a cache.
        return_residual: return how far h is from obeying the recurrence, too: worth knowing with `iterations`.
        backend: "auto" or "torch"; "reference" is the loop.

    Returns:
        h: all states, (B, T, D) or (B, T, D, 2), in the dtype of u. Without `iterations` those of the loop to rounding:
            Newton stops at a correction of at most 3e-3 (1e-7 in float64), which leaves less than its square. A
            recurrence that it does not solve in 12 corrections is walked step by step, and a warning says so once. On a
            CPU, where one step of time is wide (512 numbers of state), walking is faster to begin with.
        last: the state after the last step, (B, D) or (B, D, 2), float32 (float64 for float64 inputs).
        residual, where asked for: `newton_residual` of h, a number without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: 3 or 4 times (the cell, its Jacobian, one affine scan) for a contractive cell; the backward is one transposed
        scan, whatever the number of iterations, and keeps u and h only. Its gradients are those of the loop at h.
    Source: arXiv 2510.21450, sections 2 and 3; corrections in place of states are scanned, see `solve.py`.
    """
    name = "newton_scan"
    precise(name, u, **{f"w[{i}]": x for i, x in enumerate(w)})
    call, arguments = prepared(OPERATOR, cell, u, w, state, resets, cu_seqlens, iterations, window, backend=backend)
    if call.backend == "reference":
        shard.refuse(f"{name}'s loop")
        h, last = _loop(cell, u, w, *arguments)
    else:
        h, last = solve(cell, u, w, *arguments, iterations=iterations, window=window)
    return (h, last, residual(cell, u, w, h, *arguments)) if return_residual else (h, last)


def prepared(
    operator: Operator, cell: Cell, u: Tensor, w: Sequence[Tensor], state: Tensor | None, resets: Tensor | None,
    cu_seqlens: Tensor | None, iterations: int | None, window: int | None, *, own_kernels: bool = False,
    backend: str = "auto", name: str = "",
) -> tuple[Call, tuple[Tensor, Tensor | None, tuple[int, ...] | None]]:  # fmt: skip
    """The call, and its state, the steps to keep the state at (B, T, 1), and the borders of documents."""
    args = {"u": (u, "B T G D"), **{f"w[{i}]": (x, "D") for i, x in enumerate(w)}}
    problem = ""
    if own_kernels and (iterations is not None or window is not None):
        problem = "kernels choose iterations and window by themselves; got them given"
    elif own_kernels and shard.current() is not None:
        problem = "kernels solve whole sequences; got one that is cut across ranks"
    call = operator.begin(args, cu_seqlens=cu_seqlens, backend=backend, problem=problem, name=name)
    state = call.state(state, "D" if cell.states == 1 else "D S", S=cell.states)
    for what, number in (("iterations", iterations), ("window", window)):
        if number is not None and number < 1:
            raise ValueError(f"{call.name}: {what} must be at least 1; got {number}, leave it out to have it chosen")
    begins = call.resets(resets)
    keep = None if begins is None else (~begins).to(call.dtype).unsqueeze(-1)
    return call, (state, keep, call.cuts)


def precise(name: str, u: Tensor, **parameters: Tensor) -> None:
    """Refuse parameters that are neither of u's dtype nor of the one that is computed in."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        return  # refused for that
    for key, x in parameters.items():
        if isinstance(x, Tensor) and x.dtype != dispatch.state_dtype(u):
            check.same_dtype(name, u=u, **{key: x})


def clipped(name: str, clip: float | None, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters clamped to [-clip, clip]; as they are without one."""
    if clip is None:
        return parameters
    if not clip > 0:
        raise ValueError(f"{name}: recurrent_clip must be positive; got {clip}, leave it out for no bound")
    return tuple(x.clamp(-clip, clip) for x in parameters)


def solve(
    cell: Cell, u: Tensor, w: Sequence[Tensor], state: Tensor, keep: Tensor | None, cuts: tuple[int, ...] | None,
    *, iterations: int | None = None, window: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The torch form, on prepared arguments."""
    stretch = shard.current()
    result: tuple[Tensor, Tensor] = apply(_Solve, cell, stretch, keep, cuts, iterations, window, u, state, *w)
    return result


def _loop(
    cell: Cell, u: Tensor, w: Sequence[Tensor], state: Tensor, keep: Tensor | None, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """The definition: the cell, one step at a time, with autograd's gradients."""
    w = [x.to(state.dtype) for x in w]

    def run(u: Tensor, keep: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        h, hs = state, []
        for t, u_t in enumerate(u.to(h.dtype).unbind(1)):
            p = (h,) if cell.states == 1 else h.unbind(-1)
            if keep is not None:
                p = tuple(keep[:, t] * x for x in p)
            value = cell.value(p, u_t.unbind(1), w)
            h = value[0] if cell.states == 1 else torch.stack(list(value), dim=-1)
            hs.append(h)
        return torch.stack(hs, dim=1).to(u.dtype), h

    return each_document(run, cuts, (u, keep), state)


def _problem(
    cell: Cell, u: Tensor, w: Sequence[Tensor], state: Tensor, keep: Tensor | None, cuts: tuple[int, ...] | None
) -> Problem:
    """All planes in the dtype of the state."""
    dtype = state.dtype
    planes, parameters = u.to(dtype).unbind(2), [x.to(dtype) for x in w]
    edges = Edges.of(u.shape[1], cuts, u.device)
    return Problem(cell, planes, parameters, state_planes(state, cell.states, dtype), keep, edges)


def _states(problem: Problem, iterations: int | None, window: int | None) -> tuple[Tensor, Tensor]:
    """h (S, B, T, D) and the state that entered, (S, n, D)."""
    cell, (B, T, D) = problem.cell, problem.u[0].shape
    if iterations is not None:
        return newton(problem, iterations=iterations)[:2]
    if problem.state.is_meta:  # shapes alone: one correction of one window stands for all
        h = problem.state.new_empty(cell.states, B, T, D)
        newton(problem.part(0, min(T, _cached(B, D)), h, problem.state), iterations=1)
        return h, problem.state
    if window is None and shard.current() is not None:
        h, entered, sizes = newton(problem)
        if solved(sizes, h.dtype):
            return h, entered
        announce(cell)
        return walk(problem)
    if window is None and (T == 1 or (B * D * cell.states >= WIDE and not problem.state.is_cuda)):
        return walk(problem)
    h, entered, walked = windowed(problem, window or cell.states * _cached(B, D))
    if walked:
        announce(cell)
    return h, entered


def _cached(B: int, D: int) -> int:
    """Steps of time whose planes stay in the cache."""
    return max(1, CACHED // max(1, B * D))


class _Solve(torch.autograd.Function):
    """All states as one node. Saved for the backward: u, w, the states and what entered."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, stretch: shard.SequenceShard | None, keep: Tensor | None, cuts: tuple[int, ...] | None,
        iterations: int | None, window: int | None, u: Tensor, state: Tensor, *w: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        problem = _problem(cell, u, w, state, keep, cuts)
        h, entered = _states(problem, iterations, window)
        last = problem.edges.leaving(h, entered)
        ctx.cell, ctx.shard, ctx.cuts, ctx.keeps = cell, stretch, cuts, keep is not None
        ctx.save_for_backward(u, h, entered, *(() if keep is None else (keep,)), *w)
        out, last = (x[0] if cell.states == 1 else x.movedim(0, -1) for x in (h, last))
        return out.to(u.dtype, copy=True), last

    @staticmethod
    @first_order("newton_scan")
    def backward(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        cell: Cell = ctx.cell
        S = cell.states
        u, h, entered, *rest = ctx.saved_tensors
        keep = rest.pop(0) if ctx.keeps else None
        dtype = h.dtype
        planes, w = u.to(dtype).unbind(2), [x.to(dtype) for x in rest]
        edges = Edges.of(u.shape[1], ctx.cuts, u.device)
        problem = Problem(cell, planes, w, entered, keep, edges)
        d, dlast = (state_planes(x, S, dtype) for x in (dout, dlast))
        du, dw = torch.empty_like(u, memory_format=torch.contiguous_format), [torch.zeros_like(x) for x in w]
        if ctx.shard is None:
            dstate = _pull(problem, h, d.clone(), dlast, du, dw)
        else:
            dstate = _pull_across(problem, h, d, dlast, ctx.shard, du, dw)
        dstate = dstate[0] if S == 1 else dstate.movedim(0, -1)
        return *(None for _ in range(6)), du, dstate, *(x.to(y.dtype) for x, y in zip(dw, rest, strict=True))


def _pull(
    problem: Problem, h: Tensor, d: Tensor, dlast: Tensor, du: Tensor, dw: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """Turn d, the gradient of h, into mu_t = d_t + J_{t+1}^T mu_{t+1} in place, fill du, add to dw.

    Returns the gradient of the states that entered. From the right to the left, in stretches that stay in the cache.
    """
    cell, edges, keep, entered = problem.cell, problem.edges, problem.keep, problem.state
    _, B, T, D = h.shape
    dstate = dlast.clone()
    if not len(edges.rows):
        return dstate
    if edges.cuts is None:
        d[:, :, -1] += dlast
    else:
        d[:, 0].index_add_(1, edges.ends, dlast[:, edges.rows])
    p_whole = before(h, entered, edges, keep)
    step = _cached(B, D)
    carry: Tensor | None = None  # what reaches a stretch's last state from the steps after it
    for left in reversed(range(0, T, step)):
        right = min(left + step, T)
        p, u = p_whole[:, :, left:right], [x[:, left:right] for x in problem.u]
        linear = cell.linearise(tuple(p), u, problem.w)
        J = stacked([x for row in linear.jacobian for x in row]).unflatten(0, (cell.states, cell.states))
        if keep is not None:
            J = J * keep[:, left:right]
        first = [(t, row) for t, row in edges.begins.items() if left <= t < right]
        steps = sorted({0, *(t - left for t, _ in first)})
        at = torch.tensor(steps, device=h.device)
        entering = J.index_select(3, at)  # (S, S, B, m, D)
        if first:
            J = J.index_fill(3, torch.tensor([t - left for t, _ in first], device=h.device), 0)
        part = d[:, :, left:right]
        if carry is not None:
            part[:, :, -1] += carry
        scan_back_(J, part)
        out = (entering * part.index_select(2, at).unsqueeze(1)).sum(0)  # J^T mu, (S, B, m, D)
        carry = None if left in edges.begins else out[:, :, 0]
        for t, row in first:
            i = steps.index(t - left)
            if edges.cuts is None:
                dstate = out[:, :, i]
            else:
                dstate[:, row] = out[:, 0, i]
        pulled, parameters = cell.pull(tuple(part), tuple(p), u, problem.w, linear.kept)
        for gate, x in enumerate(pulled):
            du[:, left:right, gate] = x
        for total, x in zip(dw, parameters, strict=True):
            total.add_(x)
    return dstate


def _pull_across(
    problem: Problem, h: Tensor, d: Tensor, dlast: Tensor, stretch: shard.SequenceShard, du: Tensor,
    dw: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The same across ranks: the backward of an affine scan whose forward is of zeros and sends nothing."""
    cell, edges = problem.cell, problem.edges
    S, several = cell.states, edges.cuts is not None and len(edges.cuts) > 2
    p = before(h, problem.state, edges, problem.keep)
    linear = cell.linearise(tuple(p), problem.u, problem.w)
    J = problem.jacobian(linear.jacobian, edges.first[:0])
    scan = affine_scan if S == 1 else block_affine_scan
    A, g, dlast = (
        (J[0, 0], d[0], dlast[0]) if S == 1 else (J.movedim((0, 1), (-2, -1)), d.movedim(0, -1), dlast.movedim(0, -1))
    )
    with torch.enable_grad(), shard.use(stretch):
        b = torch.zeros_like(g).requires_grad_()
        start = torch.zeros_like(dlast).requires_grad_()
        cu = None if edges.cuts is None else torch.tensor(edges.cuts)
        with shard.with_arrivals(torch.zeros_like(start[:1] if several else start)):
            out, last = scan(A, b, start, cu_seqlens=cu, backend="torch")
        mu, dstart = torch.autograd.grad((out, last), (b, start), (g, dlast), materialize_grads=True)
    mu, dstart = (x[None] if S == 1 else x.movedim(-1, 0).contiguous() for x in (mu, dstart))
    gates, parameters = cell.pull(tuple(mu), tuple(p), problem.u, problem.w, linear.kept)
    for gate, x in enumerate(gates):
        du[:, :, gate] = x
    for total, x in zip(dw, parameters, strict=True):
        total.add_(x)
    return dstart


@torch.no_grad()
@dispatch.keeps_its_precision
def newton_residual(
    cell: Cell, u: Tensor, w: Sequence[Tensor], h: Tensor, state: Tensor | None = None, *,
    resets: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The largest |f(h_{t-1}, u_t) - h_t|: how far given states are from obeying the recurrence.

    Args:
        cell, u, w, state, resets, cu_seqlens: as for `newton_scan`.
        h: states to judge, as it returns them.

    Returns:
        A number, float32 (float64 for float64 inputs). Rounding is about 1e-7 (bfloat16 states: 4e-3). A small one at
        great length does not prove agreement: an expanding recurrence multiplies it.

    Raises:
        ValueError: as `newton_scan`.
    """
    _, arguments = prepared(OPERATOR, cell, u, w, state, resets, cu_seqlens, None, None, name="newton_residual")
    return residual(cell, u, w, h, *arguments)


@torch.no_grad()
def residual(
    cell: Cell, u: Tensor, w: Sequence[Tensor], h: Tensor, state: Tensor, keep: Tensor | None,
    cuts: tuple[int, ...] | None,
) -> Tensor:  # fmt: skip
    """`newton_residual` on prepared arguments."""
    problem = _problem(cell, u, w, state, keep, cuts)
    planes = state_planes(h, cell.states, state.dtype)
    p = before(planes, entering(problem, planes), problem.edges, keep)
    off = (stacked(cell.value(tuple(p), problem.u, problem.w)) - planes).abs()
    return shard.all_reduce_max(off.amax() if off.numel() else off.new_zeros(()))


@torch.no_grad()
@dispatch.keeps_its_precision
def newton_corrections(
    cell: Cell, u: Tensor, w: Sequence[Tensor], state: Tensor | None = None, *, resets: Tensor | None = None,
    cu_seqlens: Tensor | None = None, most: int = 12,
) -> list[float]:  # fmt: skip
    """The largest correction of every Newton step until it is down at rounding: how fast this recurrence converges.

    Args:
        cell, u, w, state, resets, cu_seqlens: as for `newton_scan`.
        most: steps at most.

    Returns:
        max |h^{k+1} - h^k| for k = 0, 1, ...; a converging recurrence squares them.

    Raises:
        ValueError: as `newton_scan`.

    Source: arXiv 2510.21450, section 2.
    """
    _, (state, keep, cuts) = prepared(
        OPERATOR, cell, u, w, state, resets, cu_seqlens, None, None, name="newton_corrections"
    )
    problem = _problem(cell, u, w, state, keep, cuts)
    return newton(problem, enough=4 * torch.finfo(state.dtype).eps, limit=most)[2]
