"""MEGA's attention: one head that sees the tokens of its own chunk, with a learnt bias by distance."""

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.chunk_grid import ChunkGrid
from zoo.layers.mixer import Layer
from zoo.layers.rotary import rotary_tables
from zoo.ops import shard
from zoo.ops.core import check, dispatch
from zoo.ops.core.algebra import Tail
from zoo.ops.core.packing import last_document

__all__ = ["ChunkState", "ChunkedAttention"]

WEIGHTS = ("softmax", "laplace", "relu2")
BIASES = ("rotary", "simple")
ROTARY_BASE = 10000.0
MEAN, DEVIATION = 0.5**0.5, (4 * torch.pi) ** -0.5  # laplace: arXiv 2209.10655, section 3.2; 0.707107 and 0.282095


class ChunkState(NamedTuple):
    """The chunk that is being filled. k: (B, C, Z); v: (B, C, E), zeros in free slots; filled: (B,) int64, below C."""

    k: Tensor
    v: Tensor
    filled: Tensor


class ChunkedAttention(Layer):
    """Causal attention of one head inside chunks of C tokens, which do not overlap: q, k (B, T, Z), v (B, T, E).

    Chunks are counted from the beginning of a sequence or document. The first token of a chunk sees itself alone.

    Args:
        d_key: Z, even.
        chunk_size: C.
        weights: what turns scores into weights. "softmax" of q k / sqrt(Z) + bias; "laplace" and "relu2" of
            q k / n + bias, one by one, where n is the number of keys that the query sees.
        bias: "rotary", two vectors turned by their positions, 2 Z numbers; or "simple", 2 C - 1 numbers.

    Raises:
        ValueError: a size below 1, an odd d_key, an unknown word.

    Source: arXiv 2209.10655, sections 3.2 and 3.5; the official code's relative positional biases.
    """

    def __init__(self, d_key: int, *, chunk_size: int, weights: str = "softmax", bias: str = "rotary"):
        super().__init__()
        if d_key < 2 or d_key % 2:
            raise ValueError(f"ChunkedAttention: d_key must be even and at least 2; got {d_key}")
        if chunk_size < 1:
            raise ValueError(f"ChunkedAttention: chunk_size must be at least 1; got {chunk_size}")
        if weights not in WEIGHTS or bias not in BIASES:
            raise ValueError(
                f"ChunkedAttention: weights must be one of {', '.join(WEIGHTS)}, and bias one of {', '.join(BIASES)}; "
                f"got {weights!r} and {bias!r}"
            )
        self.d_key, self.chunk_size, self.weights = d_key, chunk_size, weights
        self.turned = nn.Parameter(torch.empty(2, d_key)) if bias == "rotary" else None
        self.by_distance = nn.Parameter(torch.empty(2 * chunk_size - 1)) if bias == "simple" else None
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """The official start: a normal distribution of deviation 0.02."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: ChunkState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ChunkState]:
        """q, k (B, T, Z), v (B, T, E) and the chunk before them -> (B, T, E) and the chunk that is open after them.

        Raises:
            ValueError: across ranks, a state is given, or documents whose boundaries the shard does not know.
        """
        B, T, _ = q.shape
        if T == 1 and cu_seqlens is None and state is not None:
            return self._token(q, k, v, state)
        cuts = None if cu_seqlens is None else check.boundaries("ChunkedAttention", cu_seqlens, B, T)
        if shard.current() is not None:
            state = self._from_other_ranks(k, v, state, cuts)
        before_k, before_v, filled = (None, None, None) if state is None else state
        grid = ChunkGrid(B, T, self.chunk_size, cuts, filled, q.device)
        k_, v_ = grid.lay(k, before_k), grid.lay(v, before_v)
        o = grid.back(self._inside(grid.lay(q), k_, v_))
        if not T:
            o = shard.tied(o, q, k, v, before_k, before_v)
        (last_k, now), (last_v, _) = grid.last(k_, self.chunk_size), grid.last(v_, self.chunk_size)
        return o, ChunkState(last_k, last_v, now)

    def _inside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every chunk by itself: q, k (G, C, Z), v (G, C, E) -> (G, C, E)."""
        slots = torch.arange(q.shape[1], device=q.device)
        distance = slots[:, None] - slots
        return torch.bmm(self._weighed(torch.bmm(q, k.mT), distance, slots[:, None] + 1).to(v.dtype), v)

    def _token(self, q: Tensor, k: Tensor, v: Tensor, state: ChunkState) -> tuple[Tensor, ChunkState]:
        """One token of every row: it goes to the slot behind those that are filled."""
        slots = torch.arange(self.chunk_size, device=q.device)
        here = (slots == state.filled[:, None]).unsqueeze(-1)  # (B, C, 1)
        k_, v_ = torch.where(here, k.to(state.k.dtype), state.k), torch.where(here, v.to(state.v.dtype), state.v)
        distance = (state.filled[:, None] - slots).unsqueeze(1)  # (B, 1, C)
        seen = state.filled[:, None, None] + 1
        o = torch.bmm(self._weighed(torch.bmm(q, k_.to(q.dtype).mT), distance, seen).to(v.dtype), v_.to(v.dtype))
        after = (state.filled + 1) % self.chunk_size
        full = (after == 0)[:, None, None]
        return o, ChunkState(k_.masked_fill(full, 0), v_.masked_fill(full, 0), after)

    def _weighed(self, scores: Tensor, distance: Tensor, seen: Tensor) -> Tensor:
        """Weights from products of queries and keys (..., C), in float32 at least.

        Args:
            scores: (G, n, C).
            distance: of query and key, (n, C) or (G, n, C); keys at a negative one are not seen.
            seen: how many keys the query sees, to be broadcast.
        """
        wide = dispatch.state_dtype(scores)
        bias, hidden = self.bias(scores.shape[-1])[distance.clamp_min(0)].to(wide), distance < 0
        if self.weights == "softmax":
            return (scores.to(wide) / math.sqrt(self.d_key) + bias).masked_fill(hidden, float("-inf")).softmax(-1)
        scores = scores.to(wide) / seen + bias  # one by one, so that a weight depends on its own score alone
        if self.weights == "relu2":
            return scores.relu().square().masked_fill(hidden, 0)
        return (0.5 * (1 + torch.erf((scores - MEAN) / (DEVIATION * 2**0.5)))).masked_fill(hidden, 0)

    def bias(self, size: int) -> Tensor:
        """What is added to the score of a key 0, 1 ... size - 1 tokens before the query, (size,)."""
        if self.turned is None:
            assert self.by_distance is not None
            return self.by_distance[self.chunk_size - 1 :][:size]
        cos, sin = rotary_tables(torch.arange(size, device=self.turned.device), self.d_key, ROTARY_BASE)
        first, second = self.turned[0].to(torch.promote_types(self.turned.dtype, torch.float32)).chunk(2)
        other = self.turned[1].to(first.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(first.dtype) @ other

    def _from_other_ranks(
        self, k: Tensor, v: Tensor, state: ChunkState | None, cuts: tuple[int, ...] | None
    ) -> ChunkState | None:
        """The beginning of the chunk that is cut by this rank's left edge, from the ranks before."""
        place = shard.current()
        assert place is not None
        if state is not None:
            raise ValueError(
                "ChunkedAttention: across ranks chunks are counted from the first rank's first token; got a state, "
                "leave it out or run outside zoo.ops.shard.use(...)"
            )
        if cuts is not None and place.documents is None:
            raise ValueError(
                "ChunkedAttention: across ranks chunks are counted from the beginning of a document; got documents "
                "that the shard does not know, give SequenceShard documents=..."
            )
        n, size = k.shape[0] if cuts is None else len(cuts) - 1, self.chunk_size
        begun = _begun(place, k.shape[1], size)
        if not (width := max(begun)):
            return None  # stretches begin where chunks begin
        rows = torch.cat([k, v], dim=-1)
        (last,) = last_document(cuts, rows)
        arrived = shard.halo(Tail.of(last, width), rows.new_zeros(n, width, rows.shape[2]), n > len(k))
        own = begun[place.rank]
        slots = torch.cat([arrived[:, width - own :], arrived.new_zeros(n, size - own, rows.shape[2])], dim=1)
        filled = torch.zeros(n, dtype=torch.int64, device=k.device)
        (filled[:1] if cuts is not None else filled).fill_(own)
        k_, v_ = slots.split([k.shape[2], v.shape[2]], dim=-1)
        return ChunkState(k_, v_, filled)


def _begun(place: shard.SequenceShard, tokens: int, size: int) -> list[int]:
    """How many tokens of the chunk at its left edge come before each rank's stretch.

    Raises:
        ValueError: this rank does not hold `tokens` of the shard's length.
    """
    place.require_forward("chunks")
    length = tokens * place.size if place.length is None else place.length
    lefts = [shard.stretch(length, rank, place.size, place.chunk)[0] for rank in range(place.size)] + [length]
    if lefts[place.rank + 1] - lefts[place.rank] != tokens:
        raise ValueError(
            f"ChunkedAttention: rank {place.rank} of {place.size} holds {lefts[place.rank + 1] - lefts[place.rank]} of "
            f"{length} tokens; got {tokens}, give SequenceShard the length of the whole sequence"
        )
    starts = place.documents or (0,)
    return [(left - starts[bisect.bisect_right(starts, left) - 1]) % size for left in lefts[:-1]]
