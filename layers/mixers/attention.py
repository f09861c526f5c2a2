"""Softmax attention with rotary positions, grouped queries, a sliding window and a key-value cache."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.rotary import rotary_tables
from zoo.ops import attention, rotary, shard

__all__ = ["Attention"]


class AttentionState(NamedTuple):
    """The cache of one attention layer, aligned to the right: row b holds its last min(length[b], M) keys.

    k, v: (B, M, Hk, K), keys already rotated; length: (B,) int64, tokens seen so far.
    """

    k: Tensor
    v: Tensor
    length: Tensor


@register_mixer("attention")
class Attention(Mixer):
    """Causal softmax attention, (B, T, D) -> (B, T, D).

    When time is cut across ranks (zoo.ops.shard) positions are those of the whole sequence; the state that comes back
    holds the keys of the rank's own tokens, and none may be given: decode on one rank, after a prefill there.

    Args:
        d_model: D.
        n_heads: query heads; d_model // 64, at least one, when omitted.
        n_kv_heads: key and value heads, a divisor of n_heads; n_heads when omitted.
        head_dim: K; d_model // n_heads when omitted.
        window: see only the last `window` positions, the own included; None sees all. The cache keeps window - 1 rows.
        rope_base: base of the rotary frequencies; None for no positions.
        qk_norm: RMSNorm over each head of q and k before the rotation.
        backend: of zoo.ops.attention.
    """

    operators = (attention, rotary)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads = max(1, d_model // 64) if n_heads is None else n_heads
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_heads < 1 or self.n_kv_heads < 1:
            raise ValueError(f"Attention: heads must be at least 1; got {self.n_heads}, and {self.n_kv_heads} of keys")
        self.head_dim = d_model // self.n_heads if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(
                f"Attention: head_dim, d_model / n_heads when omitted, must be at least 1; got {self.head_dim} for "
                f"{self.n_heads} heads of d_model = {d_model}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"Attention: n_kv_heads must divide n_heads = {self.n_heads}; got {self.n_kv_heads}")
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"Attention: rotary positions need an even head_dim; got {self.head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"Attention: window must be at least 1 (it counts the own position); got {window}")
        self.window, self.rope_base, self.backend = window, rope_base, backend
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        past = None if state is None else state.length
        place = shard.current()
        if place is not None and state is not None:
            raise ValueError(
                "Attention: across ranks keys come from other ranks, and a cache would come before them on every rank; "
                "got a state, leave it out or run outside zoo.ops.shard.use(...)"
            )
        if self.rope_base is not None:
            if place is None or (place.documents is None and cu_seqlens is not None):
                positions = _positions(T, past, cu_seqlens, x.device)
            else:
                positions = shard.positions(place, T, x.device)[None]
            cos, sin = rotary_tables(positions, self.head_dim, self.rope_base)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if cu_seqlens is None:
            o, state = self._batch(q, k, v, state)
        else:
            o, state = self._packed(q, k, v, state, cu_seqlens)
        return self.o_proj(o.flatten(2)), state

    def _batch(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        B, T = q.shape[:2]
        lengths = None
        if state is not None and state.k.shape[1]:
            lengths = state.length.clamp(max=state.k.shape[1]) + T
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        o = attention(q, k, v, window=self.window, key_lengths=lengths, backend=self.backend)
        length = q.new_zeros(B, dtype=torch.long) if state is None else state.length
        keep = self._keep(k.shape[1])
        return o, AttentionState(k[:, k.shape[1] - keep :], v[:, v.shape[1] - keep :], length + T)

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """Each document's cached keys go before its new ones; the new caches are padded on the left to one length."""
        cuts = cu_seqlens.tolist()
        n = len(cuts) - 1
        if state is None:
            empty = k.new_zeros(n, 0, *k.shape[2:])
            state = AttentionState(empty, empty, cu_seqlens.new_zeros(n, dtype=torch.long))
        rows = state.k.shape[1]
        cached = state.length.clamp(max=rows).tolist()
        documents_k, documents_v = [], []
        for i in range(n):
            new = slice(cuts[i], cuts[i + 1])
            documents_k.append(torch.cat([state.k[i, rows - cached[i] :], k[0, new]]))
            documents_v.append(torch.cat([state.v[i, rows - cached[i] :], v[0, new]]))
        sizes = [len(document) for document in documents_k]
        cu_k = torch.tensor([0, *sizes], device=cu_seqlens.device).cumsum(0)
        if shard.current() is None:
            o = attention(
                q, torch.cat(documents_k)[None], torch.cat(documents_v)[None],
                window=self.window, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_k, backend=self.backend,
            )  # fmt: skip
        else:
            o = attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens, backend=self.backend)
        keep = self._keep(max(sizes))
        k, v = (torch.stack([_right(document, keep) for document in d]) for d in (documents_k, documents_v))
        return o, AttentionState(k, v, state.length + cu_seqlens.diff().long())

    def _keep(self, length: int) -> int:
        """Rows of the cache worth keeping: all, or what the next query's window reaches."""
        return length if self.window is None else min(length, self.window - 1)

    def init_state(self, batch: int) -> AttentionState:
        """An empty cache."""
        k = self.k_proj.weight.new_zeros(batch, 0, self.n_kv_heads, self.head_dim)
        return AttentionState(k, k.clone(), torch.zeros(batch, dtype=torch.long, device=k.device))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the cache after `length` tokens: grows until the window is full."""
        row = self.n_kv_heads * self.head_dim * self.k_proj.weight.element_size()
        return batch * (2 * row * self._keep(length) + 8)

    def extra_repr(self) -> str:
        heads = f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}"
        return f"{heads}, window={self.window}, rope_base={self.rope_base}"


def _right(document: Tensor, keep: int) -> Tensor:
    """The last `keep` rows of (L, ...), zeros on the left when there are fewer."""
    document = document[max(0, len(document) - keep) :]
    return torch.cat([document.new_zeros(keep - len(document), *document.shape[1:]), document])


def _positions(T: int, past: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, T): every token's position in its own document, cached tokens counted."""
    steps = torch.arange(T, device=device)
    if cu_seqlens is None:
        return steps[None] if past is None else past[:, None] + steps
    document = torch.repeat_interleave(
        torch.arange(len(cu_seqlens) - 1, device=device), cu_seqlens.diff(), output_size=T
    )
    steps = steps - cu_seqlens[document]
    return (steps if past is None else steps + past[document])[None]
