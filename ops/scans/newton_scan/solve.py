"""The states of a nonlinear recurrence by Newton's method, or by walking, without a graph.

The unknowns are all states at once. With h an iterate, p the states before each step, r = f(p) - h and J the Jacobian
at p, a Newton step is the linear recurrence delta_t = J_t delta_{t-1} + r_t, one affine scan, and h + delta the next
iterate. Corrections and not states are scanned: where h already obeys the recurrence, r is zero to the last bit, so
that a solved prefix stays solved however large the Jacobians are.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import Block2x2, Elementwise
from zoo.ops.scans.affine_scan.two_level import scan_backward_, scan_forward_
from zoo.ops.scans.block_affine_scan.two_level import block_scan_backward_, block_scan_forward_
from zoo.ops.scans.newton_scan.cell import Cell, Planes

# The largest correction that is taken without looking again. Newton squares errors: what is left after a correction of
# 3e-3 is about 1e-5 of the size of f's second derivatives.
ENOUGH = {torch.float32: 3e-3, torch.float64: 1e-7}
LIMIT = 12  # corrections; cells with |a| <= 0.5 need 3 or 4 (arXiv 2510.21450), so these fail for another reason
SLOW = 0.5  # after the third, a correction must be smaller than this share of the one before


@dataclass(frozen=True)
class Edges:
    """Where documents begin and end in a stretch of time, and whose state enters there.

    first, ends, rows: (m,) int64, of documents that are not empty; a batch is one document as long as T.
    begins: {first step: row} of the same.
    """

    first: Tensor
    ends: Tensor
    rows: Tensor
    begins: dict[int, int]
    cuts: tuple[int, ...] | None

    @classmethod
    def of(cls, length: int, cuts: tuple[int, ...] | None, device: torch.device) -> "Edges":
        """The edges of `length` steps cut at the documents' boundaries `cuts`; None for a batch."""
        bounds = (0, length) if cuts is None else cuts
        filled = [i for i, (left, right) in enumerate(itertools.pairwise(bounds)) if left < right]
        first, ends, rows = (
            torch.tensor(x, dtype=torch.int64, device=device)
            for x in ([bounds[i] for i in filled], [bounds[i + 1] - 1 for i in filled], filled)
        )
        return cls(first, ends, rows, {bounds[i]: i for i in filled}, cuts)

    def entering(self, state: Tensor) -> Tensor:
        """(S, n, D) -> (S, B, m, D), the state before each document's first step."""
        return state.unsqueeze(2) if self.cuts is None else state[:, None, self.rows]

    def leaving(self, h: Tensor, state: Tensor) -> Tensor:
        """The state (S, n, D) after each document; an empty one hands its own through."""
        if not len(self.rows):
            return state.clone()
        if self.cuts is None:
            return h[:, :, -1].clone()
        return state.index_copy(1, self.rows, h[:, 0, self.ends])

    def part(self, left: int, right: int, h: Tensor, state: Tensor) -> tuple["Edges", Tensor]:
        """The edges of the steps [left, right), and the states (S, m, D) that enter there after the states h."""
        if self.cuts is None:
            return Edges.of(right - left, None, h.device), h[:, :, left - 1] if left else state
        cuts, entering = [0], []
        for i, (first, stop) in enumerate(itertools.pairwise(self.cuts)):
            if max(first, left) < min(stop, right):
                cuts.append(min(stop, right) - left)
                entering.append(h[:, 0, left - 1] if first < left else state[:, i])
        return Edges.of(right - left, tuple(cuts), h.device), torch.stack(entering, dim=1)

    @property
    def inner(self) -> Tensor:
        """The first steps of all documents but the one whose state may come from another rank."""
        return self.first[0 in self.begins.values() :]


def before(h: Tensor, state: Tensor, edges: Edges, keep: Tensor | None) -> Tensor:
    """The states before each step, (S, B, T, D): h one step later, what enters each document, zeros at resets."""
    p = torch.empty_like(h)
    if not len(edges.first):
        return p
    p[:, :, 1:] = h[:, :, :-1]
    p.index_copy_(2, edges.first, edges.entering(state))
    return p if keep is None else p.mul_(keep)


def scan_(J: Tensor, d: Tensor, state: Tensor) -> None:
    """Turn d (S, B, T, D) into delta_t = J_t delta_{t-1} + d_t, in place. J (S, S, B, T, D), state (S, B, D)."""
    if len(d) == 1:
        scan_forward_(J[0, 0], d[0], state[0])
    else:
        block_scan_forward_(J, d, state)


def scan_back_(J: Tensor, d: Tensor) -> None:
    """Turn d into d_t + J_{t+1}^T d_{t+1}, in place."""
    if len(d) == 1:
        scan_backward_(J[0, 0], d[0], torch.zeros_like(d[0, :, 0]))
    else:
        block_scan_backward_(J, d, torch.zeros_like(d[:, :, 0]))


def stacked(planes: Planes) -> Tensor:
    """Planes in one tensor; a single one is taken as it is, and may be a cell's input: not to be written into."""
    return planes[0][None] if len(planes) == 1 else torch.stack(list(planes))


@dataclass(frozen=True)
class Problem:
    """One recurrence to solve: planes u (B, T, D) of each gate, parameters w (D,), state (S, n, D), all of one dtype.

    keep: (B, T, 1), 0 where an episode begins, or None.
    """

    cell: Cell
    u: Planes
    w: Planes
    state: Tensor
    keep: Tensor | None
    edges: Edges

    def jacobian(self, rows: Sequence[Planes], zero_at: Tensor) -> Tensor:
        """The rows of planes as one tensor (S, S, B, T, D), zero at resets and at the steps `zero_at`."""
        S = self.cell.states
        J = stacked([x for row in rows for x in row]).unflatten(0, (S, S))
        if self.keep is not None:
            J = J * self.keep
        made: Tensor = J.index_fill(3, zero_at, 0) if len(zero_at) else J
        return made

    def part(self, left: int, right: int, h: Tensor, state: Tensor) -> "Problem":
        """The steps [left, right), from the states h that were found before them and those that entered."""
        edges, entering = self.edges.part(left, right, h, state)
        keep = None if self.keep is None else self.keep[:, left:right]
        return Problem(self.cell, [x[:, left:right] for x in self.u], self.w, entering, keep, edges)


def newton(
    problem: Problem,
    *,
    iterations: int | None = None,
    enough: float | None = None,
    limit: int = LIMIT,
    bound: float | None = None,
) -> tuple[Tensor, Tensor, list[float]]:
    """Newton's method on the whole stretch.

    Args:
        iterations: corrections, all of them made; None: until the last one is at most `enough`, at most `limit`.
        bound: iterates are clamped to [-bound, bound].

    Returns:
        h (S, B, T, D); the state that entered, (S, n, D), which under a shard is the ranks' before; the largest
        correction of each iteration, empty when `iterations` is given. The last one above `enough`: not solved.
    """
    cell, u, w, edges = problem.cell, problem.u, problem.w, problem.edges
    h = stacked(cell.value([torch.zeros_like(u[0])] * cell.states, u, w)).clone()
    enough = ENOUGH[h.dtype] if enough is None else enough
    crossing = _Crossing.of(problem)
    left = crossing.halo(h)
    sizes: list[float] = []
    for _ in range(limit if iterations is None else iterations):
        p = before(h, left, edges, problem.keep)
        linear = cell.linearise(tuple(p), u, w)
        J = problem.jacobian(linear.jacobian, edges.inner)
        d = stacked(linear.value) - h
        entering = crossing.correction(J, d)
        left = left + entering
        scan_(J, d, entering if edges.cuts is None else entering[:, :1])
        h.add_(d)
        if bound is not None:
            h.clamp_(-bound, bound)
        if iterations is not None:
            continue
        sizes.append(crossing.largest(d))
        if not sizes[-1] > enough:  # a NaN ends it, too: nothing would mend it
            break
        if len(sizes) > 3 and not sizes[-1] < SLOW * sizes[-2]:
            break
    return h, left, sizes


def solved(sizes: list[float], dtype: torch.dtype, enough: float | None = None) -> bool:
    """Whether Newton's last correction was small enough; False for NaN."""
    return bool(sizes) and sizes[-1] <= (ENOUGH[dtype] if enough is None else enough)


def windowed(problem: Problem, window: int) -> tuple[Tensor, Tensor, bool]:
    """Newton's method on `window` steps after the other, each from the last state of the one before.

    Iterates are clamped to the cell's bounds. From a window that it does not solve on, the stretch is walked.

    Returns:
        h, the state that entered, and whether steps had to be walked.
    """
    cell, length = problem.cell, problem.u[0].shape[1]
    h = torch.empty(cell.states, *problem.u[0].shape, dtype=problem.state.dtype, device=problem.state.device)
    walked = False

    def run(state: Tensor) -> Tensor:
        nonlocal walked
        bound = None
        if cell.bound is not None:
            bound = max(cell.bound, state.abs().amax().item() if state.numel() else 0.0)
        for left in range(0, length, window):
            right = min(left + window, length)
            part, _, sizes = newton(problem.part(left, right, h, state), bound=bound)
            if not solved(sizes, h.dtype):
                walked = True
                _walk(problem, h, state, left, length)
                break
            h[:, :, left:right] = part
        return problem.edges.leaving(h, state)

    return h, _in_turn(problem, run), walked


def walk(problem: Problem) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: h and the state that entered."""
    cell = problem.cell
    h = torch.empty(cell.states, *problem.u[0].shape, dtype=problem.state.dtype, device=problem.state.device)

    def run(state: Tensor) -> Tensor:
        _walk(problem, h, state, 0, h.shape[2])
        return problem.edges.leaving(h, state)

    return h, _in_turn(problem, run)


def _walk(problem: Problem, h: Tensor, state: Tensor, left: int, right: int) -> None:
    """Steps [left, right) of h, in place."""
    cell, w, edges = problem.cell, problem.w, problem.edges
    begins = edges.begins
    steps, keep = [x.unbind(1) for x in problem.u], problem.keep
    h_t = h.unbind(2)
    for t in range(left, right):
        p = h_t[t - 1] if t else state
        if t in begins:
            p = state if edges.cuts is None else state[:, begins[t], None]
        if keep is not None:
            p = p * keep[:, t]
        for out, value in zip(h_t[t], cell.value(tuple(p), [x[t] for x in steps], w), strict=True):
            out.copy_(value)


def _in_turn(problem: Problem, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run on every rank after the one before: the state that entered here. Without a shard, one call."""
    here = shard.current()
    if here is None:
        run(problem.state)
        return problem.state
    crossing, state = _Crossing.of(problem), problem.state
    last = torch.zeros_like(state)
    for turn in range(here.size):
        if turn:
            state = crossing.handed_on(last)
        if turn == here.rank:
            with shard.use(None):
                last, mine = run(state), state
    return mine


@dataclass(frozen=True)
class _Crossing:
    """What crosses the edges of a shard: states and corrections, by the shard's own method; nothing without one."""

    problem: Problem
    active: bool

    @classmethod
    def of(cls, problem: Problem) -> "_Crossing":
        return cls(problem, shard.current() is not None)

    @property
    def several(self) -> bool:
        cuts = self.problem.edges.cuts
        return cuts is not None and len(cuts) > 2

    def halo(self, h: Tensor) -> Tensor:
        """The iterate before this rank's first step."""
        if not self.active:
            return self.problem.state
        return self.handed_on(self.problem.edges.leaving(h, self.problem.state))

    def handed_on(self, last: Tensor) -> Tensor:
        """The states (S, n, D) after the last step of the rank before, in the row of the first document."""
        S = last.shape[0]
        leaving = last[:, -1:] if self.several else last
        passing = not self.problem.u[0].shape[1] and not self.several  # no token here: what arrives goes on
        A = torch.eye(S, dtype=leaving.dtype, device=leaving.device).mul_(passing)[:, :, None, None]
        element = _element(A.expand(S, S, *leaving.shape[1:]), torch.zeros_like(leaving) if passing else leaving)
        return _planes(shard.incoming_state(element, _public(self.problem.state), self.several), S)

    def correction(self, J: Tensor, d: Tensor) -> Tensor:
        """What the ranks before correct the state by that enters here."""
        zeros = torch.zeros_like(self.problem.state)
        if not self.active:
            return zeros
        cuts = self.problem.edges.cuts
        left = 0 if cuts is None else cuts[-2]
        element = summary(J[:, :, :, left:], d[:, :, left:])
        return _planes(shard.incoming_state(element, _public(zeros), self.several), len(zeros))

    def largest(self, d: Tensor) -> float:
        """The largest correction on any rank."""
        size = d.abs().amax() if d.numel() else d.new_zeros(())
        return (shard.all_reduce_max(size) if self.active else size).item()


def entering(problem: Problem, h: Tensor) -> Tensor:
    """The states (S, n, D) before the first step here, when all ranks hold their stretch of the states h."""
    return _Crossing.of(problem).halo(h)


def summary(J: Tensor, d: Tensor) -> Elementwise | Block2x2:
    """What a stretch does to any correction: h -> A h + b."""
    S, _, B, T, D = J.shape
    b = d.clone()
    scan_(J, b, torch.zeros(S, B, D, dtype=d.dtype, device=d.device))
    columns = []
    for j in range(S):
        unit = torch.zeros(S, B, D, dtype=d.dtype, device=d.device)
        unit[j] = 1
        if not T:
            columns.append(unit)
            continue
        column = torch.zeros_like(d)
        scan_(J, column, unit)
        columns.append(column[:, :, -1])
    last = b[:, :, -1] if T else torch.zeros(S, B, D, dtype=d.dtype, device=d.device)
    return _element(torch.stack(columns, dim=1), last)


def _element(A: Tensor, b: Tensor) -> Elementwise | Block2x2:
    """From planes A (S, S, n, D) and b (S, n, D)."""
    if len(b) == 1:
        return Elementwise(A[0, 0], b[0])
    return Block2x2(A.movedim((0, 1), (-2, -1)), b.movedim(0, -1))


def _public(x: Tensor) -> Tensor:
    """Planes (S, n, D) as a state of the affine scans: (n, D), or (n, D, 2)."""
    return x[0] if len(x) == 1 else x.movedim(0, -1)


def _planes(x: Tensor, S: int) -> Tensor:
    """The other way round."""
    return x[None] if S == 1 else x.movedim(-1, 0)


def state_planes(x: Tensor, S: int, dtype: torch.dtype) -> Tensor:
    """A caller's state (n, D) or (n, D, 2) as planes (S, n, D)."""
    return _planes(x, S).to(dtype).contiguous()


def announce(cell: Cell) -> None:
    """Say, once a cell, that the parallel form did not solve it."""
    dispatch.say_once(
        f"{cell.name}: Newton's method does not solve this recurrence, so it is walked step by step: right, but slow; "
        "smaller recurrent weights make it converge (recurrent_clip=0.5 of para_gru and para_lstm)"
    )
