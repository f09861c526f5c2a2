"""Time-invariant structured state spaces: S4D (diagonal) and S4 (diagonal plus low rank), as long convolutions."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.ops import check, dispatch, shard
from zoo.ops.algebra import ComplexElementwise, Matrix
from zoo.ops.once import runs_once
from zoo.ops.packing import each_document, last_document
from zoo.ops.s4.convolved import convolved
from zoo.ops.s4.dplr import Dplr
from zoo.ops.s4.reference import s4_reference, s4d_reference
from zoo.ops.s4.systems import Diagonal


@runs_once
@dispatch.keeps_its_precision
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
    name = "s4d"
    sizes = check.shapes(
        name,
        {"u": (u, "B T H"), "log_A": (log_A, "H N 2"), "B": (B, "H N 2"), "C": (C, "H N 2"), "D": (D, "H")},
        **PAIR,
    )
    state, dtype, n, cuts = _entered(name, u, D, state, sizes, cu_seqlens)
    chosen = dispatch.resolve(name, backend, u)
    if backend == "triton" and dtype == torch.float64:
        raise ValueError(f"{name}: kernels take float32 or narrower; got float64, use backend='torch' or .float()")
    system = Diagonal(log_A.to(dtype), B.to(dtype), C.to(dtype), "torch" if dtype == torch.float64 else chosen)
    if shard.current() is not None:
        zeros = u.new_zeros(n, *log_A.shape, dtype=dtype)
        (last,) = last_document(cuts, u.to(dtype))
        state = shard.incoming_state(system.element(last), zeros if state is None else state, n > sizes["B"])
    if chosen == "reference":
        return _loop(
            lambda u, x: s4d_reference(u, x, log_A, B, C, D), u, state, n, log_A.shape, cuts, dtype, (log_A, B, C, D)
        )
    if not u.shape[1]:
        return _nothing(u, state, n, log_A.shape, dtype, (log_A, B, C, D))
    return convolved(system, u, state, D, n, cuts, dtype)


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
    name = "s4d_summary"
    sizes = check.shapes(name, {"u": (u, "B T H"), "log_A": (log_A, "H N 2"), "B": (B, "H N 2")}, **PAIR)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    dtype = dispatch.state_dtype(u)
    system = Diagonal(log_A.to(dtype), B.to(dtype), B.to(dtype), "torch")
    element = system.element(last_document(cuts, u.to(dtype))[0])
    return element if cuts is None or len(cuts) == 2 else element.reset_to(element.b)


@runs_once
@dispatch.keeps_its_precision
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
    name = "s4"
    maps = {key: (x, "H N 2") for key, x in (("A", A), ("P", P), ("B", B), ("C", C))}
    sizes = check.shapes(name, {"u": (u, "B T H"), **maps, "dt": (dt, "H"), "D": (D, "H")}, **PAIR)
    state, dtype, n, cuts = _entered(name, u, D, state, sizes, cu_seqlens)
    chosen = dispatch.resolve(name, backend, u)
    if backend == "triton":
        raise ValueError(f"{name}: there is no Triton form, it is products and transforms; use backend='torch'")
    system = Dplr(A, P, B, C, dt, dtype)
    if shard.current() is not None:
        zeros = u.new_zeros(n, *A.shape, dtype=dtype)
        (last,) = last_document(cuts, u.to(dtype))
        rows = (zeros if state is None else state).flatten(-2).unsqueeze(-1)
        inputs = (u, A, P, B, C, dt, D)
        state = shard.incoming_state(system.element(last), rows, n > sizes["B"], inputs=inputs).view(n, *A.shape)
    if chosen == "reference":
        return _loop(
            lambda u, x: s4_reference(u, x, A, P, B, C, dt, D), u, state, n, A.shape, cuts, dtype, (A, P, B, C, dt, D)
        )
    if not u.shape[1]:
        return _nothing(u, state, n, A.shape, dtype, (A, P, B, C, dt, D))
    return convolved(system, u, state, D, n, cuts, dtype)


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
    name = "s4_summary"
    maps = {key: (x, "H N 2") for key, x in (("A", A), ("P", P), ("B", B))}
    sizes = check.shapes(name, {"u": (u, "B T H"), **maps, "dt": (dt, "H")}, **PAIR)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    dtype = dispatch.state_dtype(u)
    system = Dplr(A, P, B, B, dt, dtype)
    element = system.element(last_document(cuts, u.to(dtype))[0])
    return element if cuts is None or len(cuts) == 2 else element.reset_to(element.b)


PAIR = {"2": 2}


def _entered(
    name: str, u: Tensor, D: Tensor | None, state: Tensor | None, sizes: dict[str, int], cu_seqlens: Tensor | None
) -> tuple[Tensor | None, torch.dtype, int, tuple[int, ...] | None]:
    """The state in its dtype, that dtype, how many rows it has, and the borders."""
    check.same_dtype(name, u=u, D=D)
    cuts = None if cu_seqlens is None else check.boundaries(name, cu_seqlens, sizes["B"], sizes["T"])
    n = sizes["B"] if cuts is None else len(cuts) - 1
    dtype = dispatch.state_dtype(u)
    if state is not None:
        known = {key: sizes[key] for key in "HN"} | PAIR
        check.shapes(name, {"state": (state, "n H N 2"), "u": (u, "B T H")}, n=n, **known)
        state = state.to(dtype)
    return state, dtype, n, cuts


def _loop(
    loop: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], u: Tensor, state: Tensor | None, n: int,
    shape: torch.Size, cuts: tuple[int, ...] | None, dtype: torch.dtype, parameters: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference on every document."""
    if not u.shape[1]:
        return _nothing(u, state, n, shape, dtype, parameters)
    return each_document(loop, cuts, (u,), u.new_zeros(n, *shape, dtype=dtype) if state is None else state)


def _nothing(
    u: Tensor, state: Tensor | None, n: int, shape: torch.Size, dtype: torch.dtype,
    parameters: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A stretch without tokens; its output stays in the graph, since the other ranks wait for its backward pass."""
    if state is None:
        state = u.new_zeros(n, *shape, dtype=dtype)
    return shard.tied(u, state, *parameters), state
