"""Time-invariant structured state spaces: S4D (diagonal) and S4 (diagonal plus low rank), as long convolutions."""

from collections.abc import Callable

from torch import Tensor

from zoo.ops import shard
from zoo.ops.core import dispatch
from zoo.ops.core.algebra import ComplexElementwise, Matrix
from zoo.ops.core.call import Call, Operator
from zoo.ops.core.packing import each_document
from zoo.ops.state_spaces.s4.convolved import convolved
from zoo.ops.state_spaces.s4.dplr import Dplr
from zoo.ops.state_spaces.s4.reference import s4_reference, s4d_reference
from zoo.ops.state_spaces.s4.systems import Diagonal

__all__ = ["s4", "s4_summary", "s4d", "s4d_summary"]


PAIR = {"2": 2}

S4D = Operator("s4d", cp_kind="affine")
S4 = Operator("s4", cp_kind="affine", forms=["torch"], no_kernels="it is products and transforms")


@S4D.public()
def s4d(
    u: Tensor,
    log_A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run N complex decaying states per channel: x_t = exp(log_A) x_{t-1} + B u_t, y_t = 2 Re sum_n C x_t + D u_t.

    Complex numbers are pairs (..., 2) of real ones. Each of the N states stands for itself and its conjugate, which
    makes a real state space of 2N; parameters are those of the discrete system and do not depend on time.

    Args:
        u: input, (B, T, H), any float dtype.
        log_A: logarithms of the transitions, (H, N, 2), finite, real parts <= 0 (not checked): dt * A for the
            zero-order hold. Its dtype may differ, float32 is best, as for B and C.
        B, C: input and output maps, (H, N, 2), B discretised.
        D: skip, (H,), of the dtype of u, or None.
        state: x before the first step, (B, H, N, 2); zeros when omitted. With packed documents (n, H, N, 2).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" (Triton on CUDA; torch elsewhere and for float64), "triton", "torch" or "reference". Triton
            makes the kernels; the convolution is the device's Fourier transform in both.

    Returns:
        y: (B, T, H), in the dtype of u.
        x: the state after the last step, (B, H, N, 2) or (n, H, N, 2), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run here.

    Cost: O(H N T) for the kernel, O(B H T log T) for the convolution, O(B H N T) for the final state, and as much again
        where a state is given. Kernels and transforms are float32 whatever the dtype of u; sqrt(T) powers a state are
        held, never T.
    Source: arXiv 2206.11893, sections 3.2 and 4; two-level products in place of its full Vandermonde matrix.
    """
    args = {"u": (u, "B T H"), "log_A": (log_A, "H N 2"), "B": (B, "H N 2"), "C": (C, "H N 2"), "D": (D, "H")}
    call = S4D.begin(args, alike=("u", "D"), known=PAIR, cu_seqlens=cu_seqlens, backend=backend)
    dtype, given = call.dtype, state
    state = None if given is None else call.state(given, "H N 2")
    system = Diagonal(log_A.to(dtype), B.to(dtype), C.to(dtype), call.backend)
    if shard.current() is not None:
        (last,) = call.last_document(u.to(dtype))
        state = shard.incoming_state(system.element(last), call.state(given, "H N 2"), call.several)
    if call.backend == "reference":
        return _loop(call, lambda u, x: s4d_reference(u, x, log_A, B, C, D), u, state, (log_A, B, C, D))
    if not u.shape[1]:
        return _nothing(call, u, state, (log_A, B, C, D))
    return convolved(system, u, state, D, call.documents, call.cuts, dtype)


@dispatch.keeps_its_precision
def s4d_summary(u: Tensor, log_A: Tensor, B: Tensor, *, cu_seqlens: Tensor | None = None) -> ComplexElementwise:
    """What a stretch of time does to any state: x -> a * x + b, where a depends on its length only.

    Args:
        u, log_A, B: as for `s4d`.
        cu_seqlens: boundaries of packed documents, B = 1: the state enters the first and leaves the last document, so
            that a border between them forgets everything.

    Returns:
        a (H, N, 2) and b (B, H, N, 2), float32 (float64 for float64 inputs); `apply` gives the final state.

    Cost: O(B H N T). Differentiable.
    """
    args = {"u": (u, "B T H"), "log_A": (log_A, "H N 2"), "B": (B, "H N 2")}
    call = S4D.begin(args, known=PAIR, cu_seqlens=cu_seqlens, name="s4d_summary")
    system = Diagonal(log_A.to(call.dtype), B.to(call.dtype), B.to(call.dtype), "torch")
    return call.bordered(system.element(call.last_document(u.to(call.dtype))[0]))


@S4.public()
def s4(
    u: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run x' = (diag(A) - P P^*) x + B u, y = 2 Re sum_n C x + D u, in steps of dt by the bilinear rule.

    Complex numbers are pairs (..., 2) of real ones. A, P, B, C stand for themselves and their conjugates, so that P P^*
    couples all 2N states of a channel. C is that of the system, not C (I - A^L) of one length.

    Args:
        u: input, (B, T, H), any float dtype.
        A, P, B, C: (H, N, 2), real parts of A < 0 (not checked). Their dtype may differ, float32 is best, as for dt.
        dt: step size, (H,), > 0.
        D: skip, (H,), of the dtype of u, or None.
        state: x before the first step, (B, H, N, 2); zeros when omitted. With packed documents (n, H, N, 2).
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; an empty document hands its state through.
        backend: "auto" and "torch", or "reference".

    Returns:
        y: (B, T, H), in the dtype of u.
        x: the state after the last step, (B, H, N, 2) or (n, H, N, 2), float32 (float64 for float64 inputs); feed it
            back as `state` to continue.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend is unknown or has no form here.

    Cost: O(H N T) for the kernel by Cauchy sums, O(H N^3 log T) for the power of the transition that ends them,
        O(B H T log T) for the convolution and O(B H N T) for the final state. The kernel is made in float64 and
        rounded: its C (I - A^T) is a difference of almost equal numbers when steps are short.
    Source: arXiv 2111.00396, section 3 and appendix C.
    """
    args = {"u": (u, "B T H"), **_maps(A=A, P=P, B=B, C=C), "dt": (dt, "H"), "D": (D, "H")}
    call = S4.begin(args, alike=("u", "D"), known=PAIR, cu_seqlens=cu_seqlens, backend=backend)
    given = state
    state = None if given is None else call.state(given, "H N 2")
    system = Dplr(A, P, B, C, dt, call.dtype)
    if shard.current() is not None:
        (last,) = call.last_document(u.to(call.dtype))
        rows = call.state(given, "H N 2").flatten(-2).unsqueeze(-1)
        inputs = (u, A, P, B, C, dt, D)
        arrived = shard.incoming_state(system.element(last), rows, call.several, inputs=inputs)
        state = arrived.view(-1, *A.shape)
    if call.backend == "reference":
        return _loop(call, lambda u, x: s4_reference(u, x, A, P, B, C, dt, D), u, state, (A, P, B, C, dt, D))
    if not u.shape[1]:
        return _nothing(call, u, state, (A, P, B, C, dt, D))
    return convolved(system, u, state, D, call.documents, call.cuts, call.dtype)


@dispatch.keeps_its_precision
def s4_summary(
    u: Tensor, A: Tensor, P: Tensor, B: Tensor, dt: Tensor, *, cu_seqlens: Tensor | None = None
) -> Matrix:  # fmt: skip
    """What a stretch of time does to any state: x -> M x + b, where M depends on its length only.

    Args:
        u, A, P, B, dt: as for `s4`.
        cu_seqlens: as for `s4d_summary`.

    Returns:
        M (H, 2N, 2N) and b (B, H, 2N, 1), float32 (float64 for float64 inputs), on states (B, H, N, 2) viewed as
        (B, H, 2N, 1).

    Cost: O(H N^3 log T + B H N T). Differentiable.
    """
    args = {"u": (u, "B T H"), **_maps(A=A, P=P, B=B), "dt": (dt, "H")}
    call = S4.begin(args, known=PAIR, cu_seqlens=cu_seqlens, name="s4_summary")
    system = Dplr(A, P, B, B, dt, call.dtype)
    return call.bordered(system.element(call.last_document(u.to(call.dtype))[0]))


def _maps(**maps: Tensor) -> dict[str, tuple[Tensor | None, str]]:
    return {name: (x, "H N 2") for name, x in maps.items()}


def _loop(
    call: Call,
    loop: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    state: Tensor | None,
    parameters: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """The reference on every document."""
    if not u.shape[1]:
        return _nothing(call, u, state, parameters)
    return each_document(loop, call.cuts, (u,), call.state(state, "H N 2"))


def _nothing(
    call: Call, u: Tensor, state: Tensor | None, parameters: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """A stretch without tokens; its output stays in the graph, since the other ranks wait for its backward pass."""
    state = call.state(state, "H N 2")
    return shard.tied(u, state, *parameters), state
