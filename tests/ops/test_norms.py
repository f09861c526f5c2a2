"""What the shared harness does not ask of the norms, SwiGLU and rotary."""

import functools
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import gated_rms_norm, rms_norm, rotary, swiglu
from zoo.ops.core import dispatch
from zoo.ops.core.spec import relative_error

FORMS = ["torch", "reference", pytest.param("triton", marks=pytest.mark.kernels)]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * 10.0 ** -torch.arange(size // 2).double()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 5, 3, 24), (1, 0, 24)])
def test_norms_are_torchs(shape: tuple[int, ...], backend: str) -> None:
    """In float64 on every form, kernels included; and without a weight."""
    x, gate, weight = randn(*shape), randn(*shape, seed=1), randn(24, seed=2)
    for w in (weight, None):
        want = F.rms_norm(x, (24,), w, 1e-6)
        torch.testing.assert_close(rms_norm(x, w, backend=backend), want)
        after = gated_rms_norm(x, gate, w, backend=backend)
        torch.testing.assert_close(after, want * F.silu(gate))
        before = gated_rms_norm(x, gate, w, order="gate_first", backend=backend)
        torch.testing.assert_close(before, F.rms_norm(x * F.silu(gate), (24,), w, 1e-6))


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 2, 5, 24), (2, 0, 1, 1, 24)])
def test_norms_and_swiglu_take_any_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    x, gate, weight = (randn(*s, seed=i).requires_grad_() for i, s in enumerate((shape, shape, (24,))))
    wanted = F.rms_norm(x, (24,), weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6) * F.silu(gate), F.silu(gate) * x
    ours = (
        rms_norm(x, weight, backend=backend),
        gated_rms_norm(x, gate, weight, backend=backend),
        swiglu(gate, x, backend=backend),
    )
    for got, want in zip(ours, wanted, strict=True):
        assert got.shape == shape
        torch.testing.assert_close(got, want)
        dy = randn(*shape, seed=5)
        for a, b in zip(
            torch.autograd.grad(got, (x, gate, weight), dy, allow_unused=True),
            torch.autograd.grad(want, (x, gate, weight), dy, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_leading_dimensions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"swiglu: up must be \(N0, F\) with N0 = 3 as in gate; got \(2, 4\)"):
        swiglu(randn(3, 4), randn(2, 4))
    with pytest.raises(ValueError, match=r"gated_rms_norm: gate must be \(D\), 1 dimensions; got \(2, 4\)"):
        gated_rms_norm(randn(4), randn(2, 4))
    with pytest.raises(ValueError, match=r"rms_norm: x must be \(\.\.\., D\), 1 dimension or more; got a number"):
        rms_norm(torch.tensor(1.0))


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("order", ["plain", "norm_first", "gate_first"])
def test_gradients_without_a_weight(order: str, backend: str) -> None:
    x, gate, dy = randn(2, 5, 24).requires_grad_(), randn(2, 5, 24, seed=1).requires_grad_(), randn(2, 5, 24, seed=2)

    def run(backend: str) -> tuple[Tensor, ...]:
        if order == "plain":
            return torch.autograd.grad(rms_norm(x, backend=backend), x, dy)
        return torch.autograd.grad(gated_rms_norm(x, gate, order=order, backend=backend), (x, gate), dy)  # type: ignore[arg-type]

    for ours, want in zip(run(backend), run("reference"), strict=True):
        assert relative_error(ours, want) < 1e-12


def half(backend: str) -> torch.dtype:
    """bfloat16, but float16 under Triton's interpreter, which has no bfloat16 and refuses it."""
    return torch.float16 if backend == "triton" and dispatch.INTERPRETED else torch.bfloat16


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_float32(dtype: torch.dtype, backend: str) -> None:
    """The squares of 300 overflow float16, and 4096 of them added in bfloat16 would be far off."""
    dtype = dtype if dtype == torch.float16 else half(backend)
    x = randn(1, 3, 4096, dtype=dtype) * 300
    got = rms_norm(x, backend=backend)
    assert got.dtype == dtype
    assert relative_error(got, rms_norm(x.double(), backend="reference")) < 2**-8


@pytest.mark.kernels
def test_the_weight_gradient_of_many_programs_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share 10 blocks of rows, the last of them ragged."""
    monkeypatch.setattr(importlib.import_module("zoo.ops.token_wise.rms_norm.kernels"), "PROGRAMS", 3)
    x, weight = randn(2, 600, 8, dtype=torch.float32), torch.ones(8, requires_grad=True)
    once, again = (torch.autograd.grad(rms_norm(x, weight, backend="triton").sum(), weight)[0] for _ in range(2))
    assert torch.equal(once, again)
    want = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-6).sum(), weight)[0]
    assert relative_error(once, want) < 2e-5


@pytest.mark.parametrize("backend", FORMS)
def test_rotation_keeps_lengths_and_knows_only_distances(backend: str) -> None:
    for layout in ("half", "interleaved"):
        turn = functools.partial(rotary, layout=layout, backend=backend)  # type: ignore[arg-type]
        q, k = randn(1, 1, 2, 8), randn(1, 1, 2, 8, seed=1)
        scores = []
        for i, j in ((7, 3), (104, 100)):
            qi, kj = turn(q, *tables(torch.tensor([[i]]), 8)), turn(k, *tables(torch.tensor([[j]]), 8))
            torch.testing.assert_close(qi.norm(dim=-1), q.norm(dim=-1))
            scores.append((qi * kj).sum(-1))
        torch.testing.assert_close(*scores)


@pytest.mark.parametrize("backend", FORMS)
def test_layouts_are_permutations_of_each_other(backend: str) -> None:
    x, (cos, sin) = randn(2, 5, 3, 8), tables(torch.arange(5)[None] + torch.tensor([[0], [9]]), 8)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half = rotary(x, cos, sin, backend=backend)
    torch.testing.assert_close(rotary(x[..., order], cos, sin, layout="interleaved", backend=backend), half[..., order])


@pytest.mark.parametrize("backend", FORMS)
def test_tables_stay_float32_under_half_precision(backend: str) -> None:
    """Angles of thousands: tables rounded to bfloat16 would turn by the wrong ones."""
    cos, sin = (t.float() for t in tables(torch.tensor([[30_001, 30_002]]), 8))
    x = randn(1, 2, 3, 8, dtype=half(backend))
    got = rotary(x, cos, sin, backend=backend)
    assert got.dtype == half(backend)
    assert relative_error(got, rotary(x.double(), cos, sin)) < 2**-8
    exact = rotary(x.double(), cos, sin, backend=backend)
    assert exact.dtype == torch.float64
    assert relative_error(exact, rotary(x.double(), cos.double(), sin.double())) < 1e-12


@pytest.mark.kernels
def test_kernels_take_what_is_not_contiguous() -> None:
    wide, weight = randn(2, 6, 3, 16), randn(8, seed=1)
    views: list[Callable[[Tensor], Tensor]] = [lambda x: x[..., ::2], lambda x: x[:, ::2, :, :8]]
    for view in views:
        x = view(wide)
        cos, sin = (t.expand(2, -1, -1) for t in tables(torch.arange(x.shape[1])[None], 8))
        torch.testing.assert_close(rms_norm(x, weight, backend="triton"), rms_norm(x, weight, backend="reference"))
        torch.testing.assert_close(rotary(x, cos, sin, backend="triton"), rotary(x, cos, sin, backend="reference"))
        for got in (swiglu(x[0], x[1], backend=b) for b in ("torch", "triton")):
            torch.testing.assert_close(got, F.silu(x[0]) * x[1])


def test_refusals() -> None:
    x, (cos, sin) = randn(2, 5, 3, 8), tables(torch.arange(5)[None], 8)
    with pytest.raises(ValueError, match=r"gated_rms_norm: order must be one of norm_first, gate_first; got 'both'"):
        gated_rms_norm(x, x, order="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rms_norm: eps must not be negative; got -1"):
        rms_norm(x, eps=-1)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \(D\) with D = 8 as in x; got \(3,\)"):
        rms_norm(x, x.new_ones(3))
    with pytest.raises(ValueError, match=r"gated_rms_norm: gate must be \(B, T, H, D\) with H = 3 as in x"):
        gated_rms_norm(x, x[:, :, :1])
    with pytest.raises(ValueError, match=r"rotary: layout must be one of half, interleaved; got 'gpt-j'"):
        rotary(x, cos, sin, layout="gpt-j")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rotary: x must be \(B, T, H, K\) with an even K, .*got \(2, 5, 3, 7\)"):
        rotary(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"rotary: cos must be \(rows, T, K/2\) with T = 5; got \(1, 4, 4\)"):
        rotary(x, cos[:, :4], sin[:, :4])
    with pytest.raises(ValueError, match=r"rotary: x, cos must share one dtype; got x float32, cos float64"):
        rotary(x.float(), cos, sin)
    with pytest.raises(ValueError, match=r"rotary: cos, sin must share one dtype"):
        rotary(x, cos.float(), sin)


@pytest.mark.kernels
def test_rows_too_long_for_a_kernel_are_refused() -> None:
    x = torch.ones(1, 1, 20_000)
    with pytest.raises(
        ValueError, match="rms_norm: kernels take rows of at most 16384 numbers; got D = 20000, use backend='torch'"
    ):
        rms_norm(x, backend="triton")
    torch.testing.assert_close(rms_norm(x), x, rtol=1e-5, atol=0)
