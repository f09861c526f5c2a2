"""pLSTM on a grid beyond what every operator proves: shapes, mass, norms, directions, and the graph that it is."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.ops import plstm, plstm_grid
from zoo.ops.core.spec import Inputs, parity
from zoo.ops.core.table import OPERATORS
from zoo.ops.grids.plstm_grid.reference import plstm_graph_reference
from zoo.ops.grids.plstm_grid.weights import tile_weights

SPEC = OPERATORS["plstm_grid"]
SIDE = 32


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (5, 12), (16, 16), (17, 16), (1, 300), (19, 21)])
def test_any_shape_of_grid(rows: int, columns: int) -> None:
    """One tile up to 256 cells, several with ragged ends beyond."""
    inputs = SPEC.inputs(1, rows, {"W": columns, "H": 2, "K": 2, "V": 3})
    for ours, exact in zip(SPEC.run(inputs), SPEC.run(inputs, backend="reference"), strict=True):
        assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_gradients_where_tiles_lie_side_by_side() -> None:
    inputs = SPEC.inputs(1, 10, {"W": 19, "H": 1, "K": 2, "V": 3})
    assert not SPEC.red(parity(SPEC, inputs, backend="torch", dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("side", [5, 17])
def test_outputs_alone_are_the_same_outputs(side: int) -> None:
    inputs = SPEC.without_state(SPEC.inputs(2, side, {"W": side, "H": 2, "K": 2, "V": 3}))
    leaves = [x.requires_grad_() for x in inputs.values()]
    whole, alone = (plstm_grid(**inputs, outputs_only=only) for only in (False, True))
    assert alone[1].numel() == 0
    assert_close(alone[0], whole[0])
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (whole[0], alone[0]))
    for ours, exact in zip(*grads, strict=True):
        assert_close(ours, exact)


def graph_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The grid of the first picture's first cells as a graph: outputs, and the edges below the last row."""
    q, k, v, S, T, M, D = (x[0] for x in inputs.values())
    rows, columns = q.shape[:2]
    edges, turns, source, mark, transition = [], [], [], [], []
    number: dict[tuple[int, int, int], int] = {}
    total = rows * columns

    def end(i: int, j: int, out: int) -> int:
        i, j = (i + 1, j) if out == 0 else (i, j + 1)
        return i * columns + j if i < rows and j < columns else total + len(edges)

    for i in range(rows):
        for j in range(columns):
            for out in (0, 1):
                number[i, j, out] = len(edges)
                edges.append((i * columns + j, end(i, j, out)))
                source.append(S[i, j, :, out])
                there = i + (out == 0), j + (out == 1)
                inner = there[0] < rows and there[1] < columns
                mark.append(M[there][:, out] if inner else torch.zeros_like(M[0, 0, :, 0]))
                for into, before in ((0, (i - 1, j, 0)), (1, (i, j - 1, 1))):
                    if before in number:
                        turns.append((number[before], number[i, j, out]))
                        transition.append(T[i, j, :, out, into])
    o, C = plstm_graph_reference(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), torch.stack(source), torch.stack(transition),
        torch.stack(mark), D.flatten(0, 1), torch.tensor(edges), torch.tensor(turns),
    )  # fmt: skip
    below = torch.stack([C[number[rows - 1, j, 0]] for j in range(columns)])
    return o.unflatten(0, (rows, columns)), below


def test_a_grid_is_a_graph() -> None:
    inputs = SPEC.without_state(SPEC.inputs(1, 4, {"W": 3, "H": 2, "K": 2, "V": 3}))
    o, below = graph_of(inputs)
    exact, last = plstm_grid(**inputs, backend="reference")
    assert_close(o, exact[0])
    assert_close(below, last[0])


def test_a_path_is_a_line() -> None:
    line = OPERATORS["plstm"]
    inputs = line.without_state(line.inputs(1, 9))
    q, k, v, S, T, M, D = (x[0] for x in inputs.values())
    edges = torch.stack([torch.arange(9), torch.arange(1, 10)], dim=1)
    turns = torch.stack([torch.arange(8), torch.arange(1, 9)], dim=1)
    mark = torch.cat([M[1:], M[:1]])  # of the edge into token t + 1
    o, C = plstm_graph_reference(q, k, v, S, T[1:], mark, D, edges, turns)
    exact, last = plstm(**inputs, backend="reference")
    assert_close(o, exact[0])
    assert_close(C[-1], last[0])


def test_a_graph_must_be_sorted_and_its_turns_must_meet() -> None:
    x, gate = torch.zeros(3, 1, 2), torch.zeros(3, 1)
    edges = torch.tensor([[0, 1], [1, 2]])
    args = x, x, x, gate[:2], gate[:1], gate[:2], gate
    plstm_graph_reference(*args, edges, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="an edge must run to a node of a higher number"):
        plstm_graph_reference(*args, edges.flip(1), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="a turn must join an edge"):
        plstm_graph_reference(*args, edges, torch.tensor([[1, 0]]))


def test_a_single_row_is_a_line() -> None:
    inputs = SPEC.inputs(2, 1, {"W": 40, "H": 2, "K": 3, "V": 4})
    inputs["state"] = inputs["state"] * 0
    y, _ = plstm_grid(**inputs)
    q, k, v, S, T, M, D = (x[:, 0] for x in SPEC.without_state(inputs).values())
    exact, _ = plstm(q, k, v, S[..., 1], T[..., 1, 1], M[..., 1], D)
    assert_close(y[:, 0], exact)


def test_a_grid_and_its_transpose_agree() -> None:
    inputs = SPEC.without_state(SPEC.inputs(2, 6, {"W": 9, "H": 2, "K": 3, "V": 4}))
    turned = {name: x.transpose(1, 2) for name, x in inputs.items()}
    turned |= {"source": turned["source"].flip(-1), "mark": turned["mark"].flip(-1)}
    turned["transition"] = turned["transition"].flip(-1, -2)
    assert_close(plstm_grid(**turned)[0].transpose(1, 2), plstm_grid(**inputs)[0])


def edges_from_the_corner(transition: Tensor, source: tuple[float, float] = (1.0, 0.0)) -> Tensor:
    """The two edges (I, J, 2) out of every cell of a grid, scalars, by the definition; only the corner writes."""
    I, J = transition.shape[:2]
    out = torch.zeros(I + 1, J + 1, 2, dtype=torch.float64)
    for i in range(I):
        for j in range(J):
            into = torch.stack([out[i, j + 1, 0], out[i + 1, j, 1]])
            own = torch.tensor(source, dtype=torch.float64) if i == j == 0 else torch.zeros(2, dtype=torch.float64)
            out[i + 1, j + 1] = transition[i, j] @ into + own
    return out[1:, 1:]


def p_mode(a: Tensor | float, decay: Tensor | float = 1.0) -> Tensor:
    """[[a, a], [1 - a, 1 - a]] times the decay, at every cell."""
    a, decay = (torch.as_tensor(x, dtype=torch.float64).expand(SIDE, SIDE) for x in (a, decay))
    down = torch.stack([a, a], dim=-1)
    return torch.stack([down, 1 - down], dim=-2) * decay[..., None, None]


@pytest.mark.parametrize("a", [0.25, 0.5, 0.7])
def test_p_mode_keeps_mass_in_a_direction(a: float) -> None:
    """On each anti-diagonal the mass is 1, its maximum lies at a, and falls as n**-0.5."""
    edges = edges_from_the_corner(p_mode(a), source=(a, 1 - a))
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for n in range(1, SIDE):
        on = rows + columns == n
        assert_close(edges[on].sum(), torch.tensor(1.0, dtype=torch.float64))
    n = SIDE - 1
    through = edges.sum(-1) * (rows + columns == n)
    peak = int(through.max(dim=1).values.argmax())
    assert abs(peak / n - a) < 1 / n
    assert abs(float(through.max()) * math.sqrt(n) * math.sqrt(2 * math.pi * a * (1 - a)) - 1) < 0.05


def test_the_operator_has_that_mass() -> None:
    """The same by the operator: a query at each cell reads what arrives there."""
    one = torch.ones(1, SIDE, SIDE, 1, 1, dtype=torch.float64)
    corner = torch.zeros(1, SIDE, SIDE, 1, 2, dtype=torch.float64)
    corner[0, 0, 0, 0] = torch.tensor([0.5, 0.5])
    T = p_mode(0.5).view(1, SIDE, SIDE, 1, 2, 2)
    y, _ = plstm_grid(one, one, one, corner, T, torch.ones_like(corner), corner[..., 0] * 0, scale=1.0)
    arrived = y[0, :, :, 0, 0]
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for n in range(1, SIDE):
        assert_close(arrived[rows + columns == n].sum(), torch.tensor(1.0, dtype=torch.float64))


def test_p_mode_is_bounded_by_its_sources() -> None:
    """With random angles and decays of either sign no cut carries more than what was written before it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(SIDE, SIDE, generator=generator, dtype=torch.float64)
    decay = 2 * torch.rand(SIDE, SIDE, generator=generator, dtype=torch.float64) - 1
    edges = edges_from_the_corner(p_mode(a, decay)).abs().sum(-1)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for n in range(SIDE):
        assert float(edges[rows + columns == n].sum()) <= 1 + 1e-12


def test_d_mode_reaches_every_cell() -> None:
    """All gates 1 but for the turn from above to the right: the edge down out of every cell holds 1."""
    T = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64).expand(SIDE, SIDE, 2, 2)
    edges = edges_from_the_corner(T, source=(1.0, 1.0))
    assert_close(edges[..., 0], torch.ones(SIDE, SIDE, dtype=torch.float64))


def test_weights_of_a_tile_know_where_they_cannot_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 3, 4, 3, 2, generator=generator, dtype=torch.float64)
    G = tile_weights(A, torch.randn(2, 3, 4, 3, generator=generator, dtype=torch.float64))[:, :12, :12]
    at = [(n // 4, n % 4) for n in range(12)]
    for i, sink in enumerate(at):
        for j, cell in enumerate(at):
            before = cell[0] <= sink[0] and cell[1] <= sink[1]
            assert bool((G[:, i, j] != 0).all()) == before, (sink, cell)


def test_gradients_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 3, 2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    S = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(tile_weights, (A, S))


def test_no_columns_and_no_rows() -> None:
    inputs = SPEC.inputs(2, 0, {"W": 4, "H": 1, "K": 2, "V": 3})
    y, last = plstm_grid(**inputs)
    assert y.shape == (2, 0, 4, 1, 3)
    assert torch.equal(last, inputs["state"])
    assert plstm_grid(**SPEC.inputs(2, 3, {"W": 0, "H": 1, "K": 2, "V": 3}))[0].shape == (2, 3, 0, 1, 3)


def test_there_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="plstm_grid: there is no Triton form"):
        plstm_grid(**SPEC.inputs(1, 2), backend="triton")
