"""Newton's method along time: how fast it converges, what happens where it does not, Jacobians, resets."""

import importlib
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.ops import newton_corrections, newton_residual, newton_scan, para_gru, para_lstm
from zoo.ops.core import dispatch
from zoo.ops.recurrent.para_gru.cell import ParaGRUCell
from zoo.ops.recurrent.para_lstm.cell import ParaLSTMCell
from zoo.ops.scans.newton_scan import Cell
from zoo.ops.scans.newton_scan.cell import Planes

newton_module = importlib.import_module("zoo.ops.scans.newton_scan")  # the name in zoo.ops is the function
CELLS = [pytest.param(ParaGRUCell(), 3, id="para_gru"), pytest.param(ParaLSTMCell(), 5, id="para_lstm")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int, T: int, scale: float, clip: float | None, B: int = 4, D: int = 64) -> tuple[Tensor, list[Tensor]]:
    w = [scale * random(D, seed=i + 1) for i in range(n)]
    return random(B, T, 3, D), w if clip is None else [x.clamp(-clip, clip) for x in w]


@pytest.fixture
def announcements():
    """Announcements are made once a process; here once a test."""
    dispatch.say_once.cache_clear()
    yield
    dispatch.say_once.cache_clear()


@pytest.mark.parametrize(
    ("cell", "n", "scale", "published"),
    [  # largest errors after 1, 2, ... corrections: recurrent weights as at the start, and as trained, bounded by 0.5
        pytest.param(ParaGRUCell(), 3, 0.11, (9e-1, 6e-2, 3e-4, 1e-8), id="gru-start"),
        pytest.param(ParaLSTMCell(), 5, 0.11, (9e-1, 1e-1, 1.4e-3, 3e-7), id="lstm-start"),
        pytest.param(ParaGRUCell(), 3, 0.5, (1.0, 2e-1, 5e-3, 2e-6), id="gru-trained"),
        pytest.param(ParaLSTMCell(), 5, 0.5, (1.0, 3e-1, 2e-2, 2e-5), id="lstm-trained"),
    ],
)
@pytest.mark.parametrize("T", [256, 2048])
def test_three_corrections_are_enough_for_bounded_cells(
    cell: Cell, n: int, scale: float, published: tuple[float, ...], T: int
) -> None:
    u, w = problem(n, T, scale, 0.5)
    exact, _ = newton_scan(cell, u, w)
    errors = []
    for k in range(1, 4):
        errors.append((newton_scan(cell, u, w, iterations=k)[0] - exact).abs().max().item())
    guess = newton_corrections(cell, u, w)
    assert guess[0] < published[0] * 1.3
    for error, bound in zip(errors, published[1:], strict=True):
        assert error < 10 * bound  # another seed
    assert errors[-1] > 1e-12  # and it is Newton that is measured, not the loop
    ratios = [math.log(b) / math.log(a) for a, b in itertools.pairwise(errors)]
    assert all(ratio > 1.6 for ratio in ratios)  # errors are squared


@pytest.mark.parametrize(("cell", "n"), CELLS)
def test_jacobians_and_gradients_are_autograds(cell: Cell, n: int) -> None:
    D = 5
    u = [random(2, 3, D, seed=10 + i) for i in range(3)]
    w = [0.7 * random(D, seed=20 + i) for i in range(n)]
    p = [0.5 * random(2, 3, D, seed=30 + i) for i in range(cell.states)]
    mu = [random(2, 3, D, seed=40 + i) for i in range(cell.states)]
    ours, theirs = cell.linearise(p, u, w), Cell.linearise(cell, p, u, w)
    for a, b in zip(ours.value, theirs.value, strict=True):
        assert_close(a, b, rtol=0, atol=1e-15)
    for row, other in zip(ours.jacobian, theirs.jacobian, strict=True):
        for a, b in zip(row, other, strict=True):
            assert_close(a, b, rtol=0, atol=1e-15)
    for got, want in zip(cell.pull(mu, p, u, w, ours.kept), Cell.pull(cell, mu, p, u, w, None), strict=True):
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, rtol=1e-13, atol=1e-13)


def expanding() -> dict[str, Tensor]:
    return {"u": random(2, 60, 3, 8).float(), "a": 6 * torch.sign(random(3, 8, seed=1)).float()}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_where_newton_fails_the_answer_is_the_loops(announcements: None, backend: str, scale: float) -> None:
    given = expanding()
    given["a"] = given["a"] * scale
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    leaves = {name: x.to(device).requires_grad_() for name, x in given.items()}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        y, last = para_gru(**leaves, backend=backend)
        para_gru(**leaves, backend=backend)
    if backend == "torch":
        (said,) = heard
        assert "para_gru: Newton's method does not solve" in str(said.message)
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in leaves.items()}
    want, end = para_gru(**exact, backend="reference")
    # an expanding recurrence multiplies rounding: 60 steps of it
    near = (y.cpu().double() - want).abs().amax(dim=(0, 2))
    assert near[:6].max() < 1e-4
    if scale == 1.0:
        first = [y[:, :6].sum(), want[:, :6].sum()]
        got, exactly = (torch.autograd.grad(s, list(x.values())) for s, x in zip(first, (leaves, exact), strict=True))
        for a, b in zip(got, exactly, strict=True):
            assert ((a.cpu().double() - b).norm() / b.norm()) < 1e-3
    assert torch.isfinite(y).all()
    assert last.shape == end.shape


def test_a_failing_stretch_is_exact_in_float64(announcements: None) -> None:
    """Without Newton there is no error of Newton's: the loop's numbers to the last bits, gradients included."""
    leaves = {name: x.double().requires_grad_() for name, x in expanding().items()}
    with pytest.warns(UserWarning, match="walked step by step"):
        y, _ = para_gru(**leaves)
    want, _ = para_gru(**leaves, backend="reference")
    assert_close(y[:, :12], want[:, :12], rtol=0, atol=1e-9)
    for ours, exact in zip(
        torch.autograd.grad(y[:, :8].sum(), list(leaves.values())),
        torch.autograd.grad(want[:, :8].sum(), list(leaves.values())),
        strict=True,
    ):
        assert_close(ours, exact, rtol=1e-8, atol=1e-9)


def test_small_windows_solve_what_the_whole_does_not(announcements: None) -> None:
    """Unbounded recurrent weights: the whole sequence diverges, windows of 16 steps converge."""
    u, w = problem(5, 512, 1.0, None, B=2, D=16)
    assert newton_corrections(ParaLSTMCell(), u, w)[-1] > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = newton_scan(ParaLSTMCell(), u, w, window=16)
    assert_close(y, newton_scan(ParaLSTMCell(), u, w, backend="reference")[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("wide", [0, 10**9], ids=["walked", "newton"])
@pytest.mark.parametrize("cached", [40, 10**9], ids=["in pieces", "at once"])
@pytest.mark.parametrize(("cell", "n"), CELLS)
def test_every_road_gives_the_loops_numbers(
    monkeypatch: pytest.MonkeyPatch, cell: Cell, n: int, wide: int, cached: int
) -> None:
    monkeypatch.setattr(newton_module, "WIDE", wide)
    monkeypatch.setattr(newton_module, "CACHED", cached)
    cuts = torch.tensor([0, 7, 7, 31, 50])
    resets = torch.rand(1, 50, generator=torch.Generator().manual_seed(5)) < 0.1
    u, w = problem(n, 50, 0.5, 0.9, B=1, D=3)
    state = random(4, 3, *(() if cell.states == 1 else (2,)), seed=9)
    leaves = [x.requires_grad_() for x in (u, state, *w)]
    found = []
    for backend in ("torch", "reference"):
        y, last = newton_scan(cell, u, w, state, resets=resets, cu_seqlens=cuts, backend=backend)
        loss = (y * random(*y.shape, seed=3)).sum() + (last * random(*last.shape, seed=4)).sum()
        found.append([y, last, *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*found, strict=True):
        assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.kernels
@pytest.mark.parametrize("operator", [para_gru, para_lstm])
def test_kernels_drop_the_state_at_resets(operator: object) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resets = torch.rand(2, 70, generator=torch.Generator().manual_seed(5)) < 0.1
    resets[0, 64] = resets[1, 0] = True
    w = [0.5 * random(n, 5, seed=n) for n in ((3,) if operator is para_gru else (3, 2))]
    state = random(2, 5, *(() if operator is para_gru else (2,)), seed=9)
    found = []
    for backend, dtype, place in (("triton", torch.float32, device), ("reference", torch.float64, "cpu")):
        u, *rest = (x.to(place, dtype).requires_grad_() for x in (random(2, 70, 3, 5), *w, state))
        y, last = operator(u, *rest, resets=resets.to(place), backend=backend)  # type: ignore[operator]
        loss = (y * random(*y.shape, seed=3).to(y)).sum() + (last * random(*last.shape, seed=4).to(last)).sum()
        found.append([x.detach().cpu().double() for x in (y, last, *torch.autograd.grad(loss, [u, *rest]))])
    for ours, exact in zip(*found, strict=True):
        assert ((ours - exact).norm() / exact.norm()) < 2e-5


def test_linear_recurrences_take_one_correction() -> None:
    class Leaky(Cell):
        def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
            return [w[0] * p[0] + u[0]]

    u, w = random(2, 100, 1, 4), [torch.sigmoid(random(4, seed=1))]
    y, _ = newton_scan(Leaky(), u, w, iterations=1)
    assert_close(y, newton_scan(Leaky(), u, w, backend="reference")[0], rtol=1e-12, atol=1e-12)
    assert newton_corrections(Leaky(), u, w)[1] < 1e-12


def test_the_residual_says_how_far_states_are_off() -> None:
    u, w = problem(3, 100, 0.5, 0.5)
    y, _ = newton_scan(ParaGRUCell(), u, w)
    assert newton_residual(ParaGRUCell(), u, w, y) < 1e-14
    assert 1e-4 < newton_residual(ParaGRUCell(), u, w, newton_scan(ParaGRUCell(), u, w, iterations=1)[0]) < 1
    assert newton_residual(ParaGRUCell(), u, w, y.bfloat16()) > 1e-4


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_operators_return_their_residual(backend: str) -> None:
    for operator, rows in ((para_gru, (3,)), (para_lstm, (3, 2))):
        u, w = random(2, 50, 3, 4), [0.3 * random(n, 4, seed=n) for n in rows]
        y, last, residual = operator(u, *w, return_residual=True, backend=backend)
        assert all(map(torch.equal, (y, last), operator(u, *w, backend=backend)))
        assert residual < 1e-14
        if backend == "torch":
            loose = operator(u.requires_grad_(), *w, iterations=1, return_residual=True)
            assert loose[2] > 1e-4
            assert not loose[2].requires_grad


def test_para_gru_is_torchs_gru_with_diagonal_matrices() -> None:
    """torch.nn.GRU multiplies the candidate by 1 - z, and resets after the product: equal where r leaves it alone."""
    D, T = 4, 30
    theirs = nn.GRU(D, D, batch_first=True).double()
    a, u = 0.8 * random(3, D, seed=1), random(2, T, 3, D)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(D).repeat(3, 1))
        theirs.weight_hh_l0.copy_(torch.cat([torch.diag(a[1]), torch.diag(-a[0]), torch.diag(a[2])]))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
    # one input for all three gates, with the sign of z turned
    x = random(2, T, D, seed=2)
    u = torch.stack([-x, x, x], dim=2)
    with torch.no_grad():
        want, _ = theirs(x)
    a = torch.stack([a[0], a[1], a[2]])
    assert_close(para_gru(u, a)[0], want, rtol=1e-12, atol=1e-12)


def test_clipping_bounds_the_recurrent_weights() -> None:
    u, a = random(1, 20, 3, 4), 3 * random(3, 4, seed=1)
    assert_close(para_gru(u, a, recurrent_clip=0.5)[0], para_gru(u, a.clamp(-0.5, 0.5))[0])
    p = 3 * random(2, 4, seed=2)
    assert_close(
        para_lstm(u, a, p, recurrent_clip=0.5)[0], para_lstm(u, a.clamp(-0.5, 0.5), p.clamp(-0.5, 0.5))[0]
    )  # fmt: skip


def test_a_cell_may_return_what_it_was_given() -> None:
    """Nothing is written into inputs, where a value or a Jacobian is one of them."""

    class Forgetful(Cell):
        def value(self, p: Planes, u: Planes, w: Planes) -> Planes:
            return [u[0]]

    u = random(2, 20, 1, 3)
    kept = u.clone()
    y, _ = newton_scan(Forgetful(), u, [random(3)], resets=torch.zeros(2, 20, dtype=torch.bool), window=5)
    assert torch.equal(u, kept)
    assert torch.equal(y, kept[:, :, 0])


def test_refusals() -> None:
    u, a = random(1, 5, 3, 4), random(3, 4)
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        para_gru(u, a, iterations=0)
    with pytest.raises(ValueError, match=r"resets must be a bool tensor \(B, T\) = \(1, 5\); got \(1, 5\) torch.float"):
        para_gru(u, a, resets=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="recurrent_clip must be positive; got -1"):
        para_gru(u, a, recurrent_clip=-1)
    with pytest.raises(ValueError, match="G = 3"):
        para_gru(random(1, 5, 4, 4), a)
    with pytest.raises(ValueError, match="a cell in Python has no kernels"):
        newton_scan(ParaGRUCell(), u, a.unbind(0), backend="triton")
