"""Attention of one sequence to another: a decoder's tokens to what its encoder made."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.mixer import Mixer
from zoo.ops import attention, shard

__all__ = ["CrossAttention"]


class CrossAttentionState(NamedTuple):
    """Keys and values of the memory, made once. Rows end with the memory's last row.

    k, v: (B, S, H, K); length: (B,) int64, how many rows of each exist, the last ones.
    """

    k: Tensor
    v: Tensor
    length: Tensor


class CrossAttention(Mixer):
    """Multi-head softmax attention to `memory`, (B, T, D) -> (B, T, D). Tokens do not see each other here.

    The first call makes keys and values of the memory and hands them on as the state. Later calls read the state, and
    the memory of the first one stays. Positions are in the memory already, so none are added.

    Args:
        d_model: D.
        n_heads: heads; d_model // 64, at least one, when omitted.
        memory_size: width of the memory; d_model when omitted.
        bias: of all four projections.
        backend: of zoo.ops.attention.

    Source: arXiv 1706.03762, section 3.2.3.
    """

    operators = (attention,)
    takes = ("memory", "memory_lengths")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        memory_size: int | None = None,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads = max(1, d_model // 64) if n_heads is None else n_heads
        if self.n_heads < 1 or d_model % self.n_heads:
            raise ValueError(f"CrossAttention: n_heads must divide d_model = {d_model}; got {self.n_heads} heads")
        self.head_dim, self.backend = d_model // self.n_heads, backend
        memory_size = d_model if memory_size is None else memory_size
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(memory_size, d_model, bias=bias)
        self.v_proj = nn.Linear(memory_size, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: CrossAttentionState | None = None,
        *,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> tuple[Tensor, CrossAttentionState]:
        """Attend to the memory.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None.
            memory: (B, S, memory_size), in the first call.
            memory_lengths: (B,) integers in [0, S], how many rows of the memory exist, from the first on; all when
                omitted. A sequence without any gets zeros.

        Raises:
            ValueError: the first call has no memory, or one of another batch; or time is cut across ranks.
        """
        shard.refuse("Cross attention")
        if state is None or not state.k.shape[1]:
            state = self.read(memory, memory_lengths, len(x))
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))
        o = attention(q, state.k, state.v, causal=False, key_lengths=state.length, backend=self.backend)
        return self.o_proj(o.flatten(2)), state

    def read(self, memory: Tensor | None, lengths: Tensor | None, batch: int) -> CrossAttentionState:
        """Keys and values of a memory."""
        if memory is None or len(memory) != batch:
            got = "none" if memory is None else f"one of {len(memory)}"
            raise ValueError(
                f"CrossAttention: the first call needs a memory of {batch} rows, the batch of its tokens; got {got}, "
                "give Surroundings(memory=...)"
            )
        S = memory.shape[1]
        if lengths is None:
            lengths = torch.full((batch,), S, dtype=torch.long, device=memory.device)
        elif lengths.shape != (batch,):
            raise ValueError(f"CrossAttention: memory_lengths must be ({batch},); got {tuple(lengths.shape)}")
        else:  # the operator's keys end with the last row
            places = torch.arange(S, device=memory.device) - (S - lengths.unsqueeze(1))
            memory = memory.gather(1, places.remainder(max(S, 1)).unsqueeze(-1).expand_as(memory))
        k, v = (proj(memory).unflatten(-1, (self.n_heads, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return CrossAttentionState(k, v, lengths.long())

    def init_state(self, batch: int) -> CrossAttentionState:
        """No keys: the first call reads its memory."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch, 0, self.n_heads, self.head_dim)
        return CrossAttentionState(empty, empty.clone(), torch.zeros(batch, dtype=torch.long, device=weight.device))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state for a memory of `length` rows."""
        return batch * (2 * self.n_heads * self.head_dim * self.k_proj.weight.element_size() * length + 8)

    def extra_repr(self) -> str:
        """Heads and their width, for print(model)."""
        return f"n_heads={self.n_heads}, head_dim={self.head_dim}"
