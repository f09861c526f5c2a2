"""pLSTM over a picture: four directions, in each of which states travel along an angle, or spread to every cell."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.mixer import Layer, Mixer
from zoo.layers.mixers.plstm import DIRECT, SOURCE, TRANSITION, HeadwiseGate
from zoo.layers.state import refuse_state
from zoo.ops import plstm_grid

__all__ = ["DiffusionGates", "PLSTMGrid", "PropagationGates"]

DIRECTIONS = ((), (1,), (2,), (1, 2))  # the axes, rows 1 and columns 2, that each of them turns round
ANGLES = 2.0  # orientation biases start evenly from -2 to 2 over the heads
Parametrisation = Literal["paper", "official"]


class GridGates(NamedTuple):
    """Gates of the four directions, by cell, head and direction; the first edge goes down, the second to the right.

    source, mark: (..., H, 4, 2); transition: (..., H, 4, 2, 2), by the edge that leaves and the one that enters.
    """

    source: Tensor
    transition: Tensor
    mark: Tensor


class PropagationGates(Layer):
    """P-mode: a head's angle a in (0, 1) shares out what enters a cell: a goes down, 1 - a to the right.

    Args:
        d_model: D.
        n_heads: H.
        parametrisation: "paper": source and transition are [a, 1 - a] times their gate, so that the gate is the decay.
            "official": they are [a g, 1 - a g], as in the authors' code. The columns of its transition sum to 1 for
            gates from 0 to 1, so that nothing decays, and their absolute values sum to more than 1 for gates below 0.
        gate_std: standard deviation from which the gates' weights start.

    Source: arXiv 2506.11997, section 3; `parametrisation="official"` is the code's.
    """

    weight_decay: ClassVar = {"orientation_weight": False}

    def __init__(
        self, d_model: int, n_heads: int, *, parametrisation: Parametrisation = "paper", gate_std: float = 0.0
    ):
        super().__init__()
        if parametrisation not in ("paper", "official"):
            raise ValueError(f"PropagationGates: parametrisation must be paper or official; got {parametrisation!r}")
        self.n_heads, self.parametrisation = n_heads, parametrisation
        self.orientation_bias = nn.Parameter(torch.empty(4 * n_heads))
        self.orientation_weight = nn.Parameter(torch.empty(4 * n_heads, d_model))
        self.source = HeadwiseGate(d_model, 4 * n_heads, bias=SOURCE, std=gate_std)
        self.transition = HeadwiseGate(d_model, 4 * n_heads, bias=TRANSITION, std=gate_std)
        self.mark = HeadwiseGate(d_model, 4 * n_heads, bias=SOURCE, std=gate_std)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Angles evenly over the heads, whatever the input."""
        with torch.no_grad():
            self.orientation_bias.copy_(torch.linspace(-ANGLES, ANGLES, self.n_heads).repeat(4))
        nn.init.zeros_(self.orientation_weight)

    def forward(self, x: Tensor) -> GridGates:
        """Gates of normalised inputs (..., D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = F.linear(x.to(wide), self.orientation_weight.to(wide)) * (0.5 / x.shape[-1])
        a = torch.sigmoid(angle + self.orientation_bias.to(wide))
        source, transition = self.source(x).sigmoid(), torch.tanh(5 * self.transition(x))
        if self.parametrisation == "paper":
            S, T = (
                torch.stack([a * source, (1 - a) * source], -1),
                torch.stack([a * transition, (1 - a) * transition], -1),
            )
        else:
            S, T = torch.stack([a * source, 1 - a * source], -1), torch.stack([a * transition, 1 - a * transition], -1)
        mark = self.mark(x).sigmoid().unsqueeze(-1).expand(*S.shape)
        return _by_head(self.n_heads, S, T.unsqueeze(-1).expand(*T.shape, 2), mark)


class DiffusionGates(Layer):
    """D-mode: states spread to every cell, by one path only, since one of the two turns is left out.

    Args:
        d_model: D.
        n_heads: H.
        chirality: "L": no turn from above to the right; "R": none from the left downwards.
        gate_std: standard deviation from which the gates' weights start.

    Source: arXiv 2506.11997, section 3.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, chirality: Literal["L", "R"] = "L", gate_std: float = 0.0
    ):  # fmt: skip
        super().__init__()
        if chirality not in ("L", "R"):
            raise ValueError(f"DiffusionGates: chirality must be L or R; got {chirality!r}")
        self.n_heads, self.chirality = n_heads, chirality

        def gates(n: int, bias: float) -> nn.ModuleList:
            return nn.ModuleList(HeadwiseGate(d_model, 4 * n_heads, bias=bias, std=gate_std) for _ in range(n))

        self.source = gates(2, SOURCE)  # down, right
        self.transition = gates(3, TRANSITION)  # on downwards, on to the right, the turn
        self.mark = gates(2, SOURCE)  # from above, from the left

    def forward(self, x: Tensor) -> GridGates:
        """Gates of normalised inputs (..., D)."""
        source, mark = (torch.stack([gate(x).sigmoid() for gate in gates], -1) for gates in (self.source, self.mark))
        down, right, turn = (torch.tanh(5 * gate(x)) for gate in self.transition)
        none = torch.zeros_like(turn)
        rows = [[down, turn], [none, right]] if self.chirality == "L" else [[down, none], [turn, right]]
        return _by_head(self.n_heads, source, torch.stack([torch.stack(row, -1) for row in rows], -2), mark)


def _by_head(n_heads: int, source: Tensor, transition: Tensor, mark: Tensor) -> GridGates:
    """(..., 4 H, ...) -> (..., H, 4, ...): gate f is of head f // 4 and direction f % 4, as in the authors' code."""
    return GridGates(
        source.unflatten(-2, (n_heads, 4)), transition.unflatten(-3, (n_heads, 4)), mark.unflatten(-2, (n_heads, 4))
    )


class PLSTMGrid(Mixer):
    """pLSTM's mixer for pictures, (B, N, D) -> (B, N, D): patches row by row, four directions, their sum.

    Queries, keys, values and the direct gate are the same for all directions; each has its own other gates. The sum is
    normalised in every head, and projected.

    Args:
        d_model: D.
        gates: normalised inputs (B, I, J, D) -> GridGates, `PropagationGates` or `DiffusionGates`.
        n_heads: H.
        norm_eps: of the norm of every head's output.
        backend: of the operator.

    `forward` wants the picture's `grid`, (rows, columns). There is no state, and patches see one another both ways.

    Source: arXiv 2506.11997, sections 3 and 4.
    """

    causal = False
    operators = (plstm_grid,)
    takes = ("grid",)
    weight_decay: ClassVar = {"norm_scale": False}

    def __init__(
        self, d_model: int, gates: nn.Module, *, n_heads: int = 3, norm_eps: float = 1e-5, backend: str = "auto"
    ):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"PLSTMGrid: n_heads must divide d_model = {d_model}; got {n_heads}")
        self.n_heads, self.norm_eps, self.backend = n_heads, norm_eps, backend
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.gates = gates
        self.direct = HeadwiseGate(d_model, n_heads, bias=DIRECT, std=None)
        self.norm_scale = nn.Parameter(torch.ones(n_heads, d_model // n_heads))
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: Any = None, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, None]:
        """Patches (B, N, D) of a picture of `grid` = (rows, columns), N = rows x columns -> (B, N, D), and None."""
        refuse_state("PLSTMGrid", state)
        if grid is None or grid[0] * grid[1] != x.shape[1]:
            raise ValueError(
                f"PLSTMGrid: grid must be (rows, columns) of the {x.shape[1]} tokens, which are patches alone; got "
                f"{grid}, use a model of pictures without a token in front"
            )
        x = x.unflatten(1, grid)  # (B, I, J, D)
        rows = [proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        directions = list(zip(*(gate.unbind(4) for gate in self.gates(x)), strict=True))
        direct = self.direct(x).sigmoid()  # (B, I, J, H)
        own = [direct, *(torch.zeros_like(direct) for _ in DIRECTIONS[1:])]
        # four pictures side by side in the batch, each turned so that its states flow down and to the right
        turned = [
            [z.flip(axes) for z in (*rows, *gates, d)]
            for axes, gates, d in zip(DIRECTIONS, directions, own, strict=True)
        ]
        q, k, v, source, transition, mark, direct = (torch.cat(each) for each in zip(*turned, strict=True))
        h, _ = plstm_grid(q, k, v, source, transition, mark, direct, outputs_only=True, backend=self.backend)
        ways = zip(h.chunk(4), DIRECTIONS, strict=True)
        together = torch.stack([way.flip(axes) for way, axes in ways]).sum(0)  # (B, I, J, H, V)
        normed = F.rms_norm(together, together.shape[-1:], eps=self.norm_eps) * self.norm_scale.to(together.dtype)
        return self.o_proj(normed.flatten(3).flatten(1, 2)), None

    def extra_repr(self) -> str:
        """The number of heads, for print(model)."""
        return f"n_heads={self.n_heads}"
