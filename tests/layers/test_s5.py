"""S5: its equation against dense complex matrices, episodes, its start, its refusals."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.layers import S5
from zoo.ops.core.pairs import as_complex


def make(**options: object) -> S5:
    torch.manual_seed(0)
    return S5(6, d_state=8, blocks=2, **options).double()  # type: ignore[arg-type]


def by_the_book(layer: S5, u: Tensor) -> Tensor:
    """Both of every pair of states, dense matrices, one step at a time; u (T, D)."""
    A, dt = as_complex(layer.A.detach()), layer.log_dt.detach().exp()
    A, dt = torch.cat([A, A.conj()]), torch.cat([dt, dt])
    B, C = (as_complex(x.detach()) for x in (layer.B, layer.C))
    B, C = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], dim=1)
    A_bar = torch.diag(torch.exp(dt * A))
    B_bar = torch.diag((torch.exp(dt * A) - 1) / A) @ B
    x, ys = torch.zeros(len(A), dtype=A.dtype), []
    for u_t in u:
        x = A_bar @ x + B_bar @ u_t.to(A.dtype)
        ys.append((C @ x).real + layer.D.detach() * u_t)
    return torch.stack(ys)


def test_the_equation() -> None:
    layer, u = make(), torch.randn(1, 70, 6, dtype=torch.float64)
    assert_close(layer.system(u)[0][0], by_the_book(layer, u[0]), rtol=1e-10, atol=1e-12)


def test_episodes_inside_a_row_are_rows() -> None:
    """With gradients: a row with a reset at 20 equals two rows; the second row goes on from its state."""
    layer = make(gate="full_glu")
    x = torch.randn(2, 64, 6, dtype=torch.float64, requires_grad=True)
    before = layer(torch.randn(2, 5, 6, dtype=torch.float64))[1]
    resets = torch.zeros(2, 64, dtype=torch.bool)
    resets[0, 20] = True
    y, last = layer(x, before, resets=resets)
    state = type(before)
    first, _ = layer(x[:1, :20], state(before.x[:1]))
    second, end = layer(x[:1, 20:])
    other, other_end = layer(x[1:], state(before.x[1:]))
    want = torch.cat([torch.cat([first, second], dim=1), other])
    assert_close(y, want, rtol=1e-10, atol=1e-12)
    assert_close(last.x, torch.cat([end.x, other_end.x]), rtol=1e-10, atol=1e-12)
    dy = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    for ours, exact in zip(
        torch.autograd.grad(y, leaves, dy, retain_graph=True), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_resets_cut_like_everything_else() -> None:
    layer, x = make(), torch.randn(2, 30, 6, dtype=torch.float64)
    resets = torch.rand(2, 30) < 0.2
    y, last = layer(x, resets=resets)
    state, parts = None, []
    for t in range(30):
        part, state = layer(x[:, t : t + 1], state, resets=resets[:, t : t + 1])
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), y)
    assert_close(state.x, last.x)


def test_the_start_is_hippo_in_blocks() -> None:
    layer = make()
    A = as_complex(layer.A.detach())
    assert_close(A[:2], A[2:])
    assert_close(A.real, torch.full((4,), -0.5, dtype=torch.float64))
    assert_close(A.imag[:2], torch.tensor([0.55650, 4.60329], dtype=torch.float64), rtol=0, atol=6e-6)
    wide = S5(256, d_state=256)
    assert 0.8 < 256 * as_complex(wide.B).abs().square().mean() < 1.2  # Lecun-normal, turned
    assert 0.8 < 256 * as_complex(wide.C).abs().square().mean() < 1.2


def test_clipping_keeps_the_memory_fading() -> None:
    layer, free = make(), make(clip=False)
    for x in (layer, free):
        with torch.no_grad():
            x.A[:, 0] = 0.5
    u = torch.randn(1, 3000, 6, dtype=torch.float64)
    assert layer(u)[1].x.abs().max() < 1e3
    assert free(u)[1].x.abs().max() > 1e6


@pytest.mark.parametrize(("options", "words"), [
    ({"d_state": 6, "blocks": 2}, "d_state must be a multiple of 2 \\* blocks = 4; got 6"),
    ({"gate": "glu"}, "gate must be one of full_glu, half_glu1, half_glu2, none; got 'glu'"),
])  # fmt: skip
def test_refusals(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        S5(4, **options)  # type: ignore[arg-type]
