"""The definition of pLSTM on a grid, and on any directed acyclic graph."""

import torch
from torch import Tensor


def plstm_grid_reference(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, state: Tensor,
    *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cell after cell, in the dtype of state; the outputs and the edges below the last row.

    q, k (B, I, J, H, K), v (B, I, J, H, V), source and mark (B, I, J, H, 2), transition (B, I, J, H, 2, 2), direct
    (B, I, J, H); state (B, J, H, K, V) are the edges above the first row, and zeros are to the left.
    """
    dtype, rows = state.dtype, []
    above = list(state.unbind(1))
    q, k, v, source, transition, mark, direct = (x.to(dtype) for x in (q, k, v, source, transition, mark, direct))
    for i in range(q.shape[1]):
        left, row = torch.zeros_like(above[0]), []
        for j in range(q.shape[2]):
            write = k[:, i, j].unsqueeze(-1) * v[:, i, j].unsqueeze(-2)  # (B, H, K, V)
            S, T, M, D = (x[:, i, j, ..., None, None] for x in (source, transition, mark, direct))
            read = M[:, :, 0] * above[j] + M[:, :, 1] * left + D * write
            row.append(torch.einsum("bhkv,bhk->bhv", read, q[:, i, j] * scale))
            down = S[:, :, 0] * write + T[:, :, 0, 0] * above[j] + T[:, :, 0, 1] * left
            left = S[:, :, 1] * write + T[:, :, 1, 0] * above[j] + T[:, :, 1, 1] * left
            above[j] = down
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1), torch.stack(above, dim=1)


def plstm_graph_reference(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, edges: Tensor,
    turns: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """pLSTM on a directed acyclic graph of N nodes and E edges, one node after another.

    C_e = S_e k_n v_n^T + sum over the edges e' into n of T_{e' e} C_{e'} for every edge e that leaves node n, and
    o_n = scale q_n^T (sum over the edges e into n of M_e C_e + D_n k_n v_n^T).

    Args:
        q, k: (N, H, K); v: (N, H, V).
        source, mark: S and M of every edge, (E, H): S belongs to the node where it begins, M to that where it ends.
        transition: T of every turn, (R, H).
        direct: D, (N, H).
        edges: (E, 2) integers, where every edge begins and ends; the node of the lower number comes first.
        turns: (R, 2) integers, an edge that ends at a node and one that begins there.
        scale: K**-0.5 when omitted.

    Returns:
        o (N, H, V), and C of every edge, (E, H, K, V).

    Raises:
        ValueError: an edge runs from a higher to a lower number, or a turn joins edges that do not meet.
    """
    if bool((edges[:, 0] >= edges[:, 1]).any()):
        raise ValueError("plstm_graph_reference: an edge must run to a node of a higher number; sort them first")
    if bool((edges[turns[:, 0], 1] != edges[turns[:, 1], 0]).any()):
        raise ValueError(
            "plstm_graph_reference: a turn must join an edge that ends at a node with one that begins there"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    C: dict[int, Tensor] = {}
    out = []
    for n in range(q.shape[0]):
        write = k[n].unsqueeze(-1) * v[n].unsqueeze(-2)  # (H, K, V)
        read = direct[n, :, None, None] * write
        for e in (edges[:, 1] == n).nonzero()[:, 0].tolist():
            read = read + mark[e, :, None, None] * C[e]
        out.append(torch.einsum("hkv,hk->hv", read, q[n] * scale))
        for e in (edges[:, 0] == n).nonzero()[:, 0].tolist():
            C[e] = source[e, :, None, None] * write
            for r in (turns[:, 1] == e).nonzero()[:, 0].tolist():
                C[e] = C[e] + transition[r, :, None, None] * C[int(turns[r, 0])]
    return torch.stack(out), torch.stack([C[e] for e in range(len(edges))])
