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

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.call import Call, Limit, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.recurrent.rnn_sequential.cells import CELLS
from zoo.ops.recurrent.rnn_sequential.layout import documents
from zoo.ops.recurrent.rnn_sequential.loop import rnn_loop

if dispatch.HAS_TRITON:
    from zoo.ops.recurrent.rnn_sequential import kernels

# Read by the test that wants a spec in every operator's folder.
NO_SPEC = "the machine of four operators, each of which has a spec of its own; it has no public function"

MAX_D = 128  # numbers a head that the kernels hold on chip

LIMITS = [Limit("D", MAX_D, "heads", "use more heads")]

Reference = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, R, b, state), all in one dtype


def operator(name: str) -> Operator:
    """The value of one of them; `name` is that of a cell."""
    return Operator(name, cp_kind="serial", limits=LIMITS)


def run(
    operator: Operator, reference: Reference, x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checks, and the form that was chosen. Shapes as in the operators' docstrings; the name is that of a cell."""
    cell = CELLS[operator.name]
    counts = {str(n): n for n in (cell.given, cell.recurrent, cell.gates, cell.states)}
    args = {
        "x": (x, f"B T {cell.given} H D"), "R": (R, f"{cell.recurrent} H D D"), "b": (b, f"{cell.gates} H D")
    }  # fmt: skip
    here = shard.current()
    over_heads = here is not None and here.method == "heads" and here.size > 1
    local = None if over_heads else cu_seqlens  # boundaries are checked by the call on slices of heads
    call = operator.begin(args, alike=("x", "R", "b"), known=counts, cu_seqlens=local, backend=backend)
    if over_heads:
        return _over_heads(operator, reference, x, R, b, state, cu_seqlens, backend)
    state = call.state(state, f"{cell.states} H D")
    if b is None:
        b = torch.zeros(cell.gates, *R.shape[1:3], dtype=x.dtype, device=x.device)

    def form(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _form(call, reference, x, R, b, state)

    return form(x, R, b, state) if here is None or here.size == 1 else _serial(form, x, R, b, state, call.cuts)


def _form(
    call: Call, reference: Reference, x: Tensor, R: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checked arguments, without a shard; some of the rows or heads of the call."""
    B, T = x.shape[:2]
    if not B * T:  # the output stays in the graph: other ranks wait for its backward pass
        return shard.tied(x[:, :, 0], R, b, state), state
    name, cuts = call.name, call.cuts
    if call.backend == "reference" or call.one_token:  # one token: nothing to loop over
        dtype, matrices = state.dtype, (R.to(state.dtype), b.to(state.dtype))

        def loop(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return reference(x.to(dtype), *matrices, state)

        h, last = each_document(loop, cuts, (x,), state)
        return h.to(x.dtype), last
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, R, b, state))
    if call.backend == "triton":
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
    operator: Operator, reference: Reference, x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slices of time become slices of heads, and the state never travels."""

    def by_heads(
        x: Tensor, R: Tensor, b: Tensor | None, state: Tensor | None, *, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, last = run(
            operator, reference, x.transpose(2, 3), R.transpose(0, 1), None if b is None else b.transpose(0, 1),
            None if state is None else state.transpose(1, 2), cu_seqlens, backend,
        )  # fmt: skip
        return h, last.transpose(1, 2)

    by_heads.__name__ = operator.name
    h, last = shard.over_heads(split={"x": 2, "R": 0, "b": 0})(by_heads)(
        x.transpose(2, 3), R.transpose(0, 1), None if b is None else b.transpose(0, 1),
        None if state is None else state.transpose(1, 2), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return h, last.transpose(1, 2)
