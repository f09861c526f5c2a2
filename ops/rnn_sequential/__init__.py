"""What the operators `lstm`, `gru`, `elman` and `slstm` share: checks, forms, and time cut across ranks.

Each head has matrices of its own and never sees another one. The steps are nonlinear in the state, so no summary of a
stretch replaces running it: time is sequential, and heads and sequences are what runs side by side.

| file | its one idea |
|---|---|
| `cells.py` | what tells the cells apart: a step forward, and the linear recurrence of gradients |
| `layout.py` | sequences side by side, one slab a step, packed documents without padding |
| `loop.py` | the torch form: one loop over time as one node of the graph |
| `kernels.py` | the Triton form: the recurrent matrices stay on chip for the whole sequence |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.ops import check, dispatch, shard
from zoo.ops.packing import each_document
from zoo.ops.rnn_sequential.cells import CELLS
from zoo.ops.rnn_sequential.layout import documents
from zoo.ops.rnn_sequential.loop import rnn_loop

if dispatch.HAS_TRITON:
    from zoo.ops.rnn_sequential import kernels

MAX_D = 128  # numbers a head that the kernels hold on chip

Reference = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, R, b, state), all in one dtype


def run(
    name: str, reference: Reference, x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checks, and the form that was chosen. Shapes as in the operators' docstrings; `name` is that of a cell."""
    cell = CELLS[name]
    counts = {str(n): n for n in (cell.given, cell.recurrent, cell.gates, cell.states)}
    args = {
        "x": (x, f"B T {cell.given} H D"), "R": (R, f"{cell.recurrent} H D D"), "b": (b, f"{cell.gates} H D")
    }  # fmt: skip
    sizes = check.shapes(name, args, **counts)
    B, T, H, D = (sizes[dim] for dim in "BTHD")
    check.same_dtype(name, x=x, R=R, b=b)
    chosen = _backend(name, backend, x)
    here = shard.current()
    if here is not None and here.method == "heads" and here.size > 1:
        return _over_heads(name, reference, x, R, b, state, cu_seqlens, backend)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, B, T)
    n, dtype = B if cuts is None else len(cuts) - 1, dispatch.state_dtype(x)
    if state is None:
        state = torch.zeros(n, cell.states, H, D, dtype=dtype, device=x.device)
    check.shapes(name, {"state": (state, f"n {cell.states} H D"), "x": (x, args["x"][1])}, n=n, H=H, D=D, **counts)
    state = state.to(dtype)
    if b is None:
        b = torch.zeros(cell.gates, H, D, dtype=x.dtype, device=x.device)

    def form(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _form(name, reference, x, R, b, state, cuts, chosen, backend)

    return form(x, R, b, state) if here is None or here.size == 1 else _serial(form, x, R, b, state, cuts)


def _backend(name: str, backend: str, x: Tensor) -> str:
    """What runs; kernels hold heads up to a size and compute in float32."""
    chosen = dispatch.resolve(name, backend, x)
    if chosen != "triton":
        return chosen
    if x.dtype == torch.float64:
        if backend == "triton":
            raise ValueError(f"{name}: kernels take float32 or narrower; got float64, use backend='torch' or .float()")
        return "torch"
    if x.shape[-1] > MAX_D:
        rule = f"{name}: kernels take heads of at most {MAX_D} numbers; got D = {x.shape[-1]}"
        if backend == "triton":
            raise ValueError(f"{rule}, use more heads or backend='torch'")
        dispatch.say_once(f"{rule}, so the torch form runs; more heads are faster")
        return "torch"
    return chosen


def _form(
    name: str, reference: Reference, x: Tensor, R: Tensor, b: Tensor, state: Tensor, cuts: tuple[int, ...] | None,
    chosen: str, asked: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checked arguments, without a shard."""
    B, T = x.shape[:2]
    if not B * T:  # the output stays in the graph: other ranks wait for its backward pass
        return shard.tied(x[:, :, 0], R, b, state), state
    step = T == 1 and cuts is None and asked != "triton"  # nothing to loop over
    if chosen == "reference" or step:
        dtype, matrices = state.dtype, (R.to(state.dtype), b.to(state.dtype))

        def loop(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return reference(x.to(dtype), *matrices, state)

        h, last = each_document(loop, cuts, (x,), state)
        return h.to(x.dtype), last
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, R, b, state))
    if chosen == "triton":
        row, begin, length, _ = documents(B, T, cuts, x.device)
        h, last, _ = kernels.rnn_fwd(x, R, b, state, row, begin, length, name, keep)
    else:
        h, last, _, _ = rnn_loop(x, R, b, state, name, cuts, keep)
    return h, last


# -- time cut across ranks --------------------------------------------------------------------------------------------


def _serial(
    form: Callable[..., tuple[Tensor, Tensor]], x: Tensor, R: Tensor, b: Tensor, state: Tensor,
    cuts: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state goes from rank to rank; sequences are the micro-batches, or heads where there are more of them."""
    B, T, _, H, D = x.shape
    if cuts is None and B >= H:
        return shard.serial(lambda x, state: form(x, R, b, state), (x,), state)

    # Heads first, as rows. The state of the first document comes and that of the last one goes; those of the others
    # travel inside with the output, in one tensor, since a row has one output.
    def rows(x: Tensor, R: Tensor, b: Tensor, others: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.cat([first, others], dim=1).transpose(0, 1)  # (n, heads, S, D)
        h, last = form(x.movedim(0, 3), R.transpose(0, 1), b.transpose(0, 1), before.transpose(1, 2))
        last = last.permute(2, 0, 1, 3)  # (heads, n, S, D)
        both = torch.cat([h.movedim(2, 0).flatten(1).to(last.dtype), last.flatten(1)], dim=1)
        return both, last if cuts is None else last[:, -1:]

    by_head = state.permute(2, 0, 1, 3)  # (H, n, S, D)
    first = by_head.shape[1] if cuts is None else 1
    inputs = (x.movedim(3, 0), R.transpose(0, 1), b.transpose(0, 1), by_head[:, first:])
    both, _ = shard.serial(rows, inputs, by_head[:, :first])
    h, last = both.split([B * T * D, both.shape[1] - B * T * D], dim=1)
    return h.view(H, B, T, D).movedim(0, 2).to(x.dtype), last.view(by_head.shape).permute(1, 2, 0, 3)


def _over_heads(
    name: str, reference: Reference, x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slices of time become slices of heads, and the state never travels."""

    def by_heads(
        x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None, *, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, last = run(
            name, reference, x.transpose(2, 3), R.transpose(0, 1), None if b is None else b.transpose(0, 1),
            None if state is None else state.transpose(1, 2), cu_seqlens, backend,
        )  # fmt: skip
        return h, last.transpose(1, 2)

    by_heads.__name__ = name
    h, last = shard.over_heads(split={"x": 2, "R": 0, "b": 0})(by_heads)(
        x.transpose(2, 3), R.transpose(0, 1), None if b is None else b.transpose(0, 1),
        None if state is None else state.transpose(1, 2), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return h, last.transpose(1, 2)
