"""Softmax attention with rotary positions, grouped queries, a sliding window and a key-value cache."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.layers.kv_cache import AttentionSlots, AttentionState, KeyValues, append, begin, reserve, reserve_window
from zoo.layers.mixer import Mixer
from zoo.layers.mixer_registry import register_mixer
from zoo.layers.norms import RMSNorm
from zoo.layers.rotary import rotary_tables
from zoo.ops import Visible, attention, rotary, shard
from zoo.ops.core import check

__all__ = ["Attention"]

Cache = AttentionState | AttentionSlots


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
    takes = ("cu_seqlens", "positions", "visible")

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
        self,
        x: Tensor,
        state: Cache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        visible: Visible | None = None,
    ) -> tuple[Tensor, Cache]:
        """x (B, T, D) and the keys before it -> y (B, T, D) and all keys that later tokens see.

        Args:
            x: (B, T, D).
            state: of an earlier call, or None.
            cu_seqlens: boundaries of packed documents.
            positions: (B or 1, T), where the tokens stand, for the rotation; else one behind the other.
            visible: which tokens of the call see which, in place of the causal mask. Beside a state its keys are slots:
                those of the state, and T behind them. Token i of row b is in slot state.length[b] + i.

        Raises:
            ValueError: `visible` beside documents or a window.
        """
        if visible is not None:
            given = {"cu_seqlens": cu_seqlens, "a window": self.window}
            beside = [name for name, value in given.items() if value is not None]
            if beside:
                raise ValueError(f"Attention: visible says all that is seen; leave out {', '.join(beside)}")
        y, written = self._attend(x, state, cu_seqlens, positions, visible)
        return y, written.last()

    def look_ahead(self, x: Tensor, state: Cache, *, cu_seqlens: Tensor) -> tuple[Tensor, KeyValues]:
        """As `forward`; the slots themselves know the state after every prefix (see zoo.layers.state.LooksAhead)."""
        return self._attend(x, state, cu_seqlens)

    def reserve(self, state: Cache, slots: int) -> Cache:
        """A state with room for `slots` tokens a row, owned by the caller; see zoo.layers.kv_cache.AttentionSlots.

        A window's cache gets all the slots that it will ever need; each call makes it anew.
        """
        return reserve(state, slots) if self.window is None else reserve_window(state, self.window)

    def _attend(
        self,
        x: Tensor,
        state: Cache | None,
        cu_seqlens: Tensor | None,
        positions: Tensor | None = None,
        visible: Visible | None = None,
    ) -> tuple[Tensor, KeyValues]:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        place = shard.current()
        if place is not None and state is not None:
            raise ValueError(
                "Attention: across ranks keys come from other ranks, and a cache would come before them on every rank; "
                "got a state, leave it out or run outside zoo.ops.shard.use(...)"
            )
        if self.rope_base is not None:
            if positions is None and (place is None or (place.documents is None and cu_seqlens is not None)):
                positions = _positions(T, None if state is None else state.length, cu_seqlens, x.device)
            elif positions is None and place is not None:
                positions = shard.positions(place, T, x.device)[None]
            assert positions is not None
            cos, sin = rotary_tables(positions, self.head_dim, self.rope_base)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if state is None or not state.k.shape[1] or not T:
            o, written = self._first(q, k, v, state, cu_seqlens, visible)
        elif cu_seqlens is None:
            o, written = self._next(q, k, v, state, None, visible)
        else:
            pad, unpad = _rows(cu_seqlens, T)
            o, written = self._next(pad(q), pad(k), pad(v), state, cu_seqlens.diff().long())
            o = unpad(o)
        return self.o_proj(o.flatten(2)), written

    def _first(
        self, q: Tensor, k: Tensor, v: Tensor, state: Cache | None, cu_seqlens: Tensor | None, visible: Visible | None
    ) -> tuple[Tensor, KeyValues]:
        """No keys come before those of the call, or no tokens come with it."""
        o = attention(q, k, v, window=self.window, cu_seqlens=cu_seqlens, visible=visible, backend=self.backend)
        keep, past = self._keep, None if state is None else state.length
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().long()
            if k.shape[1]:
                pad, _ = _rows(cu_seqlens, k.shape[1])
                k, v = pad(k), pad(v)
            else:
                k, v = (z.new_zeros(len(lengths), 0, *z.shape[2:]) for z in (k, v))
        else:
            lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.long, device=k.device)
        if state is not None and state.k.shape[1]:  # no tokens
            return o, KeyValues(state.k, state.v, state.length, state.length, lengths, type(state), None)
        return o, begin(k, v, past, lengths, keep)

    def _next(
        self, q: Tensor, k: Tensor, v: Tensor, state: Cache, lengths: Tensor | None, visible: Visible | None = None
    ) -> tuple[Tensor, KeyValues]:
        """Rows (B, T, H, K) behind cached keys; of row b the first lengths[b] tokens count."""
        written = append(state, k, v, lengths, self._keep)
        if visible is not None:
            return attention(q, written.k, written.v, visible=visible, backend=self.backend), written
        o = attention(q, written.k, written.v, window=self.window, past=written.filled, backend=self.backend)
        return o, written

    @property
    def _keep(self) -> int | None:
        """Slots of the cache worth keeping: what the next query's window reaches, or all."""
        return None if self.window is None else self.window - 1

    def init_state(self, batch: int) -> AttentionState:
        """A cache of `batch` rows without keys."""
        k = self.k_proj.weight.new_zeros(batch, 0, self.n_kv_heads, self.head_dim)
        return AttentionState(k, k.clone(), torch.zeros(batch, dtype=torch.long, device=k.device))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the cache after `length` tokens: grows until the window is full."""
        row = self.n_kv_heads * self.head_dim * self.k_proj.weight.element_size()
        slots = length if self._keep is None else min(length, self._keep)
        return batch * (2 * row * slots + 8)

    def extra_repr(self) -> str:
        """Heads, window and rotary base, for print(model)."""
        heads = f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}"
        return f"{heads}, window={self.window}, rope_base={self.rope_base}"


def _rows(cu_seqlens: Tensor, T: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How packed documents (1, T, ...) become padded rows (n, longest, ...), and how rows are packed again."""
    cuts = check.boundaries("Attention", cu_seqlens, 1, T)
    longest = max(right - left for left, right in itertools.pairwise(cuts))
    steps = torch.arange(longest, device=cu_seqlens.device)
    source = (cu_seqlens[:-1, None] + steps).clamp(max=T - 1)  # (n, longest)
    row = torch.repeat_interleave(
        torch.arange(len(cuts) - 1, device=cu_seqlens.device), cu_seqlens.diff(), output_size=T
    )
    step = torch.arange(T, device=cu_seqlens.device) - cu_seqlens[row]
    return lambda x: x[0, source], lambda x: x[row, step][None]


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
