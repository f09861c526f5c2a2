"""ViG: its cost against the count of the published code, and its mixer against the equations in plain torch."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.bench.flops import forward_flops
from zoo.layers import ViG
from zoo.ops import gated_linear_attention


@pytest.mark.everything
@pytest.mark.parametrize(("size", "multiply_adds"), [("t", 1.17e9), ("s", 4.48e9), ("b", 17.6e9)])
def test_flops_at_224_pixels_are_those_of_the_published_code(size: str, multiply_adds: float) -> None:
    """The count of all products; the paper's figure leaves SwiGLU's last one out. Chunks cost up to 2 % more."""
    with torch.device("meta"):
        flops, _ = forward_flops(zoo.create_model("vig", size=size))
    assert flops / 2 == pytest.approx(multiply_adds, rel=0.02)


@pytest.mark.parametrize("activation", [False, True])
def test_the_mixer_is_its_equations(activation: bool) -> None:
    torch.manual_seed(0)
    D, H, rows, columns = 16, 2, 3, 5
    mixer = ViG(D, n_heads=H, activation=activation).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(2, rows * columns, D, dtype=torch.float64)
    ours, state = mixer(x, grid=(rows, columns))
    assert state is None

    assert mixer.conv is not None
    silu = F.silu if activation else (lambda z: z)
    u = F.conv2d(x.mT.reshape(2, D, rows, columns), mixer.conv.weight, padding=1, groups=D)
    u = silu(u.flatten(2).mT)
    q, k, v = (z.unflatten(-1, (H, -1)) for z in (u @ mixer.qkv_proj.weight.T).split((D // 2, D // 2, D), dim=-1))
    g = F.logsigmoid(mixer.decay_proj(u)).unflatten(-1, (2, H, -1)) / 16
    left = gated_linear_attention(q, k, v, g[:, :, 0], backend="reference")[0]
    right = gated_linear_attention(*(z.flip(1) for z in (q, k, v, g[:, :, 1])), backend="reference")[0].flip(1)
    y, local = (left + right) / 2, u.unflatten(-1, (H, -1))

    def normed(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    gate = torch.sigmoid(u @ mixer.gate_proj.weight.T + mixer.gate_proj.bias).unflatten(-1, (H, -1))
    o = gate * normed(y, mixer.far_norm.weight) + (1 - gate) * normed(local, mixer.near_norm.weight)
    assert_close(ours, silu(o.flatten(2)) @ mixer.o_proj.weight.T, rtol=1e-10, atol=1e-11)


def test_a_picture_without_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the rows and columns of its 6 patches; got grid = None"):
        ViG(8, n_heads=2)(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="d_model must be a multiple of twice n_heads; got 6 and 2"):
        ViG(6, n_heads=2)
