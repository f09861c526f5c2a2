"""The time-invariant state spaces: known kernels, both forms over long sequences, kernels, and what is kept."""

import math

import pytest
import torch
from torch import Tensor

from zoo.ops import s4, s4d
from zoo.ops.core.pairs import as_complex, as_pairs
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.state_spaces.s4 import dplr
from zoo.ops.state_spaces.s4.dplr import Dplr, cauchy_kernel
from zoo.ops.state_spaces.s4.reference import s4_reference, s4d_reference
from zoo.ops.state_spaces.s4.vandermonde import vandermonde, vandermonde_transposed


def lin(N: int, H: int = 1) -> Tensor:
    """S4D-Lin's A, (H, N, 2): -1/2 + i pi n."""
    A = torch.complex(torch.full((N,), -0.5, dtype=torch.float64), math.pi * torch.arange(N, dtype=torch.float64))
    return as_pairs(A.expand(H, -1))


def legs(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO-LegS over its N / 2 conjugate pairs: A, P, B (1, N / 2, 2), and the basis V, (N, N / 2)."""
    n = torch.arange(N, dtype=torch.float64)
    B, P = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(n + 1)
    w, V = torch.linalg.eigh(-1j * (A + torch.outer(P, P) + 0.5 * torch.eye(N)).to(torch.complex128))
    keep = w > 0
    V = V[:, keep]
    rows = (torch.complex(torch.full_like(w, -0.5), w)[keep], V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype))
    return *(as_pairs(x).unsqueeze(0) for x in rows), V  # type: ignore[return-value]


def impulse(T: int, H: int = 1) -> Tensor:
    u = torch.zeros(1, T, H, dtype=torch.float64)
    u[:, 0] = 1
    return u


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("rule", "want"), [
    ("zoh", [0.38701121, 0.35034119, 0.30098495, 0.24402016, 0.18480892, 0.12845668]),
    ("bilinear", [0.38576660, 0.34987723, 0.30144490, 0.24536250, 0.18682839, 0.13082682]),
])  # fmt: skip
def test_kernels_known_to_eight_digits(rule: str, want: list[float], backend: str) -> None:
    """N = 4, A = -1/2 + i pi n, B = C = 1, dt = 0.1."""
    A, dt = as_complex(lin(2)), 0.1
    one = torch.ones_like(A)
    if rule == "zoh":
        log_A, B = dt * A, (torch.exp(dt * A) - 1) / A
    else:
        log_A, B = torch.log((1 + dt / 2 * A) / (1 - dt / 2 * A)), dt / (1 - dt / 2 * A)
    y, _ = s4d(impulse(6), as_pairs(log_A), as_pairs(B), as_pairs(one), backend=backend)
    assert relative_error(y[0, :, 0], torch.tensor(want, dtype=torch.float64)) < 2e-8
    if rule == "bilinear":
        given = (lin(2), 0 * lin(2), as_pairs(one), as_pairs(one), torch.tensor([dt], dtype=torch.float64))
        y, _ = s4(impulse(6), *given, backend=backend)
        assert relative_error(y[0, :, 0], torch.tensor(want, dtype=torch.float64)) < 2e-8


def test_the_low_rank_form_is_hippo() -> None:
    """The kernel of the pairs equals that of the real HiPPO matrix, by powers of its bilinear transition."""
    N, L, dt = 8, 32, 0.1
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    M, eye = -torch.tril(torch.outer(root, root), -1) - torch.diag(n + 1), torch.eye(N, dtype=torch.float64)
    step, enter = (torch.linalg.solve(eye - dt / 2 * M, x) for x in (eye + dt / 2 * M, dt * root))
    C = torch.randn(N, dtype=torch.float64)
    want = torch.stack([C @ torch.linalg.matrix_power(step, l) @ enter for l in range(L)])
    A, P, B, V = legs(N)
    seen = as_pairs((C.to(V.dtype) @ V).unsqueeze(0))
    y, _ = s4(impulse(L), A, P, B, seen, torch.tensor([dt], dtype=torch.float64))
    assert relative_error(y[0, :, 0], want) < 1e-12


@pytest.mark.parametrize("L", [1, 2, 3, 31, 32, 33])
def test_cauchy_sums_at_every_length_and_at_minus_one(L: int) -> None:
    """Even lengths have a node at -1, where z is infinite; its value is C (I + A)^-1 B of the discrete system."""
    A, P, B, _ = legs(8)
    C = as_pairs(torch.randn(1, 4, dtype=torch.complex128))
    dt = torch.tensor([0.1], dtype=torch.float64)
    system = Dplr(A, P, B, C, dt, torch.float64)
    M, row, enter = system.power(0)[0], system.readout[0], as_pairs(system.B_bar)[0].flatten()
    ends = as_complex((row - row @ torch.linalg.matrix_power(M, L)).view(1, 4, 2)).conj() / 2
    K = cauchy_kernel(*(as_complex(x) for x in (A, P, B)), ends, dt, L)[0]
    want = torch.stack([row @ torch.linalg.matrix_power(M, l) @ enter for l in range(L)])
    assert relative_error(K, want) < 1e-12
    if L % 2 == 0:
        at = torch.fft.rfft(K)[L // 2].real
        row = row - row @ torch.linalg.matrix_power(M, L)
        assert relative_error(at, row @ torch.linalg.solve(torch.eye(8, dtype=M.dtype) + M, enter)) < 1e-12


def long(dtype: torch.dtype, mode: str) -> dict[str, Tensor]:
    """H = 8, N = 64: LegS for S4, Lin for S4D, steps from 0.001 to 0.1, T = 4096."""
    torch.manual_seed(0)
    dt = torch.logspace(-3, -1, 8, dtype=torch.float64)
    C = torch.randn(8, 32, 2, dtype=torch.float64)
    if mode == "s4":
        A, P, B = (x.expand(8, -1, -1) for x in legs(64)[:3])
        made = {"A": A, "P": P, "B": B, "C": C, "dt": dt}
    else:
        A = as_complex(lin(32, 8))
        log_A = dt[:, None] * A
        made = {"log_A": as_pairs(log_A), "B": as_pairs(torch.expm1(log_A) / A), "C": C}
    return {"u": torch.randn(1, 4096, 8, dtype=torch.float64), **made} | {"dtype": dtype}  # type: ignore[dict-item]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("mode", ["s4d", "s4"])
def test_convolution_equals_recurrence_over_4096_steps(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    given = long(dtype, mode)
    given = {name: x.to(dtype) for name, x in given.items() if isinstance(x, Tensor)}
    function, loop = (s4d, s4d_reference) if mode == "s4d" else (s4, s4_reference)
    y, last = function(**given)
    x = torch.zeros(1, 8, 32, 2, dtype=dtype)
    want, end = loop(**given, state=x, D=None)
    assert relative_error(y, want) < tolerance
    assert relative_error(last, end) < tolerance
    assert (y - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 1000])
def test_powers_and_their_transpose(L: int) -> None:
    """Against all powers written out; <w V, u> = <w, V^T u> as well."""
    torch.manual_seed(0)
    z, w = lin(5, 3) * 0.05, torch.randn(2, 3, 5, 2, dtype=torch.float64)
    full = torch.exp(as_complex(z).unsqueeze(-1) * torch.arange(L))  # (H, N, L)
    K = 2 * torch.einsum("bhn,hnl->bhl", as_complex(w), full).real
    assert relative_error(vandermonde(z, w, L), K) < 1e-12
    u = torch.randn(2, L, 3, dtype=torch.float64)
    S = torch.einsum("hnl,blh->bhn", full.flip(-1), u.to(full.dtype))
    assert relative_error(vandermonde_transposed(z, u), as_pairs(S)) < 1e-12


@pytest.mark.parametrize("form", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_large_phases_keep_their_digits(form: str) -> None:
    """10,000 steps of up to 3 radians: a float32 product of the two would be off by a thousandth."""
    torch.manual_seed(0)
    z = torch.stack([-torch.rand(1, 7) * 1e-4, 3 * torch.rand(1, 7)], dim=-1)
    w = torch.randn(1, 1, 7, 2)
    exact = vandermonde(z.double(), w.double(), 10_000)
    if form == "triton":
        from zoo.ops.state_spaces.s4 import kernels

        ours = kernels.vandermonde_fwd(z, w, 10_000)
    else:
        ours = vandermonde(z, w, 10_000)
    assert relative_error(ours, exact) < 3e-5


@pytest.mark.kernels
@pytest.mark.parametrize(("n", "N", "L"), [(1, 4, 5), (2, 17, 70), (1, 33, 2100), (3, 1, 64)])
def test_the_kernel_against_float64(n: int, N: int, L: int) -> None:
    """Values and gradients, over more than one tile and block of modes."""
    from zoo.ops.state_spaces.s4 import kernels

    torch.manual_seed(0)
    z = torch.stack([-0.02 * torch.rand(2, N), 4 * torch.randn(2, N)], dim=-1).requires_grad_()
    w = torch.randn(n, 2, N, 2, requires_grad=True)
    dK = torch.randn(n, 2, L)
    K = kernels.vandermonde_fwd(z, w, L)
    wide = [x.detach().double().requires_grad_() for x in (z, w)]
    exact = vandermonde(*wide, L)
    assert relative_error(K, exact) < 2e-5
    ours, want = torch.autograd.grad(K, (z, w), dK), torch.autograd.grad(exact, wide, dK.double())
    for a, b in zip(ours, want, strict=True):
        assert relative_error(a, b) < 2e-5


def test_no_number_for_every_mode_and_step_is_kept() -> None:
    H, N, T = 4, 32, 4096
    given = OPERATORS["s4d"].inputs(1, T, {"H": H, "N": N})
    leaves = {name: x.float().requires_grad_() for name, x in given.items() if name != "state"}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        s4d(**leaves)
    assert max(kept) < H * N * T / 4


def test_cauchy_sums_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: x.requires_grad_() for name, x in OPERATORS["s4"].inputs(1, 50).items()}
    whole = s4(**given)[0]
    cotangent = torch.randn_like(whole)
    want = torch.autograd.grad(whole, list(given.values()), cotangent)
    monkeypatch.setattr(dplr, "NODES", 60)
    parts = s4(**given)[0]
    assert relative_error(parts, whole) < 1e-14
    for a, b in zip(torch.autograd.grad(parts, list(given.values()), cotangent), want, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_a_single_step_with_a_state_is_the_cheap_form(name: str) -> None:
    spec = OPERATORS[name]
    given = spec.inputs(2, 1)
    for ours, want in zip(spec.run(given), spec.run(given, backend="reference"), strict=True):
        assert relative_error(ours, want) < 1e-12
    with torch.autograd.profiler.profile() as seen:
        spec.run(given)
    assert not any("fft" in event.key for event in seen.key_averages())


@pytest.mark.kernels
def test_what_has_no_kernel_says_so() -> None:
    with pytest.raises(ValueError, match="kernels take float32 or narrower; got float64"):
        OPERATORS["s4d"].run(OPERATORS["s4d"].inputs(1, 4), backend="triton")
    with pytest.raises(ValueError, match=r"s4: there is no Triton form.*backend='torch'"):
        OPERATORS["s4"].run(OPERATORS["s4"].inputs(1, 4), backend="triton")
