"""pLSTM on a grid: states on the edges from each cell to the one below and to the one on its right."""

import itertools

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.call import Operator
from zoo.ops.grids.plstm_grid.reference import plstm_grid_reference
from zoo.ops.grids.plstm_grid.tiles import plstm_grid_alone, plstm_grid_tiles

__all__ = ["plstm_grid"]

OPERATOR = Operator("plstm_grid", cp_kind="frontier", forms=("torch",), no_kernels="its tiles are matrix products")


@OPERATOR.public()
def plstm_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    outputs_only: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let states flow down and to the right over a grid of cells, through gates at every cell.

    An edge leaves every cell downwards (0) and to the right (1). Two enter it, from above (0) and from the left (1).
    out_o = S_o k v^T + T_{o,0} in_0 + T_{o,1} in_1, and y = scale q^T (M_0 in_0 + M_1 in_1 + D k v^T).

    Args:
        q, k: queries and keys, (B, I, J, H, K), rows in dimension 1, any float dtype, shared by q, k and v.
        v: values, (B, I, J, H, V).
        source: S, what a cell writes to its edges down and right, (B, I, J, H, 2); the dtype of gates may differ.
        transition: T, (B, I, J, H, 2, 2), by the edge that leaves and the edge that enters. Columns with a sum of
            absolute values of at most 1 keep states bounded; so does |T| <= 1 where one of the turns is 0.
        mark: M, how the edges that enter are read, (B, I, J, H, 2).
        direct: D, how a cell reads itself, (B, I, J, H).
        state: the edges above the first row, (B, J, H, K, V); zeros when omitted. With packed pictures (n, J, H, K, V).
        scale: factor on q; K**-0.5 when omitted.
        outputs_only: the second result is empty, (0, J, H, K, V): saves its cost, most of it for a small picture.
        cu_seqlens: boundaries (n + 1,) in rows of packed pictures of one width, B = 1; an empty one hands its state
            through.
        backend: "auto" and "torch" (by tiles, on any device), or "reference".

    Returns:
        y: (B, I, J, H, V), in the dtype of v.
        last: the edges below the last row, (B, J, H, K, V) or (n, J, H, K, V), float32 (float64 for float64 inputs);
            feed it back as `state` to go on with the rows below.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend is unknown or has no form here.

    Cost: n (K + V) products a cell and head inside a tile of n cells. A picture of at most 256 cells is one tile.
        Larger ones have tiles of 64, which costs about 36 K V more a cell. Across ranks rows are cut and one row of
        edges travels, in micro-batches.
    Source: arXiv 2506.11997. The authors' code calls the first axis x and the edge along it "right"; here rows are the
        first axis, and that edge goes down.
    """
    gates = {"source": (source, "B T J H O"), "transition": (transition, "B T J H O O"), "mark": (mark, "B T J H O")}
    args = {"q": (q, "B T J H K"), "k": (k, "B T J H K"), "v": (v, "B T J H V"), **gates, "direct": (direct, "B T J H")}
    call = OPERATOR.begin(args, alike=("q", "k", "v"), known={"O": 2}, cu_seqlens=cu_seqlens, backend=backend)
    cuts, scale = call.cuts, q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, source, transition, mark, direct)
    here = shard.current()
    alone = here is None or here.size == 1
    if outputs_only and state is None and cuts is None and alone and call.backend == "torch" and q.numel():
        y = plstm_grid_alone(*inputs, scale, call.dtype)
        return y.to(v.dtype), y.new_zeros(0, *q.shape[2:], v.shape[-1])
    state = call.state(state, "J H K V")
    if backend == "reference":
        if not alone:
            shard.refuse("plstm_grid's loop")
        y, last = _each_picture(inputs, state, cuts, scale)
    elif cuts is None:
        y, last = shard.frontier(_Strip(scale), inputs, state)
    else:
        others = state[1:].unsqueeze(0)  # (1, n - 1, J, H, K, V)
        y, last = shard.frontier(_Pictures(cuts, _Strip(scale)), [*inputs, others], state[:1])
        y, edges = y.split([call.length, others.shape[1] * q.shape[-1]], dim=1)
        edges = edges[0].unflatten(0, (-1, q.shape[-1])).permute(0, 2, 3, 1, 4)  # as they are told in _Pictures
        last = torch.cat([edges.to(last.dtype), last])
    return y.to(v.dtype), last[:0] if outputs_only else last


def _each_picture(
    inputs: tuple[Tensor, ...], state: Tensor, cuts: tuple[int, ...] | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The loop on every picture by itself."""
    v = inputs[2]
    if cuts is None:
        return plstm_grid_reference(*(*inputs, state), scale=scale) if v.numel() else (torch.zeros_like(v), state)
    outputs, lasts = [v[:, :0].to(state.dtype)], []
    for i, (top, bottom) in enumerate(itertools.pairwise(cuts)):
        last = state[i : i + 1]
        if top < bottom:
            y, last = plstm_grid_reference(*(*(x[:, top:bottom] for x in inputs), last), scale=scale)
            outputs.append(y)
        lasts.append(last)
    return torch.cat(outputs, dim=1), torch.cat(lasts)


class _Strip:
    """Some columns of a strip; one without rows or columns stays in the graph of its inputs and of what arrived."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, above, left = given
        q, _, v = inputs[:3]
        assert q is not None
        assert v is not None
        assert above is not None
        if q.shape[1] and q.shape[2]:
            tensors = [x for x in inputs if x is not None]
            return plstm_grid_tiles(*(*tensors, above), left=left, scale=self.scale)
        y = shard.tied(v.to(above.dtype), *inputs, above)
        right = above.new_zeros(*q.shape[:2], *above.shape[2:]) if left is None else left
        return y, above, right


class _Pictures:
    """Some columns of a strip with several pictures: the state of the first one comes, that of the last one goes.

    The edges above the others are an input. Their own last edges come with the output, K rows (J, H, V) each.
    """

    def __init__(self, cuts: tuple[int, ...], strip: _Strip) -> None:
        self.cuts, self.strip = cuts, strip

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, others, above, left = given
        assert others is not None
        assert above is not None
        states = torch.cat([above, others[0]])
        outputs, lasts, rights = [], [], []
        for i, (top, bottom) in enumerate(itertools.pairwise(self.cuts)):
            rows = slice(top, bottom)
            parts = [None if x is None else x[:, rows] for x in (*inputs, left)]
            y, last, right = self.strip(*parts[:-1], states[i : i + 1], parts[-1])
            outputs.append(y)
            lasts.append(last)
            rights.append(right)
        edges = (last[0].permute(2, 0, 1, 3).unsqueeze(0) for last in lasts[:-1])  # (1, K, J, H, V)
        return torch.cat([*outputs, *edges], dim=1), lasts[-1], torch.cat(rights, dim=1)
