"""pLSTM's layers beyond what every mixer proves: gates, modes, directions."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.layers import PLSTM, DiffusionGates, HeadwiseGate, PLSTMGrid, PropagationGates
from zoo.ops import plstm_grid

GRID = 4, 5


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights far from their start, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def layer(mode: str, **options: str) -> PLSTMGrid:
    gates = PropagationGates(16, 2, **options) if mode == "P" else DiffusionGates(16, 2, **options)  # type: ignore[arg-type]
    mixer = PLSTMGrid(16, gates, n_heads=2)
    filled(mixer)
    return mixer


def patches(rows: int = GRID[0], columns: int = GRID[1]) -> Tensor:
    return torch.randn(2, rows * columns, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_gate_sees_its_slice_alone() -> None:
    gate = filled(HeadwiseGate(12, 3, bias=1.0))
    x = torch.randn(2, 12, dtype=torch.float64)
    weight = torch.block_diag(*gate.weight)  # type: ignore[misc]
    assert_close(gate(x), x @ weight.T + gate.bias)
    with pytest.raises(ValueError, match="the number of gates must divide d_model = 12; got 5"):
        HeadwiseGate(12, 5, bias=0.0)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("P", {"parametrisation": "paper"}), ("P", {"parametrisation": "official"}), ("D", {"chirality": "L"}),
     ("D", {"chirality": "R"})],
)  # fmt: skip
def test_the_layer_is_four_loops_over_cells(mode: str, options: dict[str, str]) -> None:
    """By hand: each direction on a turned picture, the direct gate once, norm and projection."""
    mixer, x = layer(mode, **options), patches()
    picture = x.unflatten(1, GRID)
    q, k, v = (p(picture).unflatten(-1, (2, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    S, T, M = mixer.gates(picture)
    total = torch.sigmoid(mixer.direct(picture)).unsqueeze(-1) * (q * k).sum(-1, keepdim=True) * v * 8**-0.5
    for o, axes in enumerate(((), (1,), (2,), (1, 2))):
        turned = [z.flip(axes) for z in (q, k, v, S[:, :, :, :, o], T[:, :, :, :, o], M[:, :, :, :, o])]
        h, _ = plstm_grid(*turned, torch.zeros_like(turned[3][..., 0]), backend="reference")
        total = total + h.flip(axes)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm_scale
    assert_close(mixer(x, grid=GRID)[0], mixer.o_proj(normed.flatten(3).flatten(1, 2)))


@pytest.mark.parametrize("mode", ["P", "D"])
@pytest.mark.parametrize(("axis", "places"), [(1, [1, 0, 3, 2]), (2, [2, 3, 0, 1])])
def test_a_turned_picture_swaps_the_directions(mode: str, axis: int, places: list[int]) -> None:
    """The gates' parameters change places with the directions, and the output turns with the picture."""
    mixer, x = layer(mode), patches()

    class Turned(nn.Module):
        """The same gates, the directions in other places."""

        def __init__(self, gates: nn.Module):
            super().__init__()
            self.gates = gates

        def forward(self, picture: Tensor) -> list[Tensor]:
            return [gate[:, :, :, :, places] for gate in self.gates(picture)]

    y, _ = mixer(x, grid=GRID)
    mixer.gates = Turned(mixer.gates)
    turned = x.unflatten(1, GRID).flip(axis).flatten(1, 2)
    assert_close(mixer(turned, grid=GRID)[0].unflatten(1, GRID).flip(axis).flatten(1, 2), y)


def test_the_papers_transitions_are_bounded_and_the_codes_are_not() -> None:
    """Sums of columns of |T|: at most 1 as in the paper; 1 for gates of either size in the code, and beyond below 0."""
    x = torch.randn(500, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = {}
    for parametrisation in ("paper", "official"):
        gates = PropagationGates(16, 2, parametrisation=parametrisation)  # type: ignore[arg-type]
        filled(gates)
        sums[parametrisation] = gates(x).transition.abs().sum(-2)
    assert sums["paper"].max() <= 1 + 1e-12
    assert sums["paper"].min() < 0.5
    assert sums["official"].min() >= 1 - 1e-12
    assert sums["official"].max() > 1.5


def test_diffusion_leaves_out_one_turn() -> None:
    x = torch.randn(3, 16, dtype=torch.float64)
    for chirality, missing in (("L", (1, 0)), ("R", (0, 1))):
        T = filled(DiffusionGates(16, 2, chirality=chirality))(x).transition  # type: ignore[arg-type]
        zero = [(o, i) for o in (0, 1) for i in (0, 1) if not T[..., o, i].any()]
        assert zero == [missing]


def test_gates_start_where_the_authors_start_them() -> None:
    gates, x = PropagationGates(24, 3), torch.randn(5, 24)
    S, T, M = gates(x)
    a = torch.sigmoid(torch.linspace(-2, 2, 3).repeat(4)).view(3, 4)
    source, transition = torch.sigmoid(torch.tensor(-4.0)), torch.tanh(torch.tensor(5.0))
    assert_close(S[0, ..., 0], a * source)
    assert_close(T[0, ..., 1, 0], (1 - a) * transition)
    assert_close(M[0], torch.full((3, 4, 2), float(source)))


def test_every_cell_reaches_every_other() -> None:
    mixer, x = layer("D"), patches(3, 4)
    y, _ = mixer(x, grid=(3, 4))
    for place in range(12):
        changed = x.clone()
        changed[:, place] += 1
        moved = (mixer(changed, grid=(3, 4))[0] - y).abs().sum((0, 2))
        assert (moved > 1e-9).all(), place


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"n_heads must divide expand \* d_model = 32; got 3"):
        PLSTM(16, n_heads=3)
    with pytest.raises(ValueError, match="parametrisation must be paper or official; got 'other'"):
        PropagationGates(16, 2, parametrisation="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chirality must be L or R; got 'X'"):
        DiffusionGates(16, 2, chirality="X")  # type: ignore[arg-type]
    mixer, x = layer("D"), patches()
    with pytest.raises(ValueError, match=r"grid must be \(rows, columns\) of the 20 tokens.*; got None"):
        mixer(x)
    with pytest.raises(ValueError, match=r"got \(3, 5\)"):
        mixer(x, grid=(3, 5))
    with pytest.raises(ValueError, match="n_heads must divide d_model = 16; got 3"):
        PLSTMGrid(16, DiffusionGates(16, 2), n_heads=3)
