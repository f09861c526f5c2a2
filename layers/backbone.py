"""The backbone that every causal sequence model shares: embedding, blocks, norm, head."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.head_loss import head_loss
from zoo.layers.initialise import initialise
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Surroundings
from zoo.layers.model import Input, Model, SaysInputs
from zoo.layers.norms import RMSNorm
from zoo.layers.padding import Rows
from zoo.layers.stack import Stack
from zoo.layers.state import LayersPrefixes, Prefixes
from zoo.ops import Visible, linear_cross_entropy
from zoo.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """What every SequenceModel is told; a model's configuration adds its mixer's fields.

    d_model, n_layers, vocab_size: width, depth, number of tokens.
    hidden_size: of the SwiGLU; None for LLaMA's rule (8/3 d_model, up to a multiple of 256), 0 for no feed-forward.
    pattern: mixers by layer in the grammar of zoo.layers.pattern; empty for the model's own mixer everywhere.
    tie_embeddings: the head uses the embedding's matrix.
    norm_eps: of the block's and the final RMSNorm.
    residual_scale: each block learns, channel by channel, how much of its input goes past the mixer.
    dropout: share of the numbers that the halves of a block add to its input which is dropped in training.
    init_std: standard deviation of every linear, embedding and short convolution weight; a mixer with a method
        `initialise(n_layers)` starts as that says.
    activation_checkpointing: recompute each block in the backward pass and keep only its input: the model starts with
        MemoryPlan(recompute="block"). `SequenceModel.use_memory` has the other ways.
    """

    d_model: Annotated[int, Range(1)] = 128
    n_layers: Annotated[int, Range(1, 10_000)] = 4
    vocab_size: Annotated[int, Range(1)] = 32000
    hidden_size: Annotated[int | None, Range(0)] = None
    pattern: str = ""
    tie_embeddings: bool = False
    norm_eps: Annotated[float, Range(0)] = 1e-6
    residual_scale: bool = False
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    init_std: Annotated[float, Range(0)] = 0.02
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


class SequenceModel(Model):
    """Tokens -> logits through a stack of blocks; time may be cut anywhere, the state carries on.

    Args:
        config: a SequenceConfig.
        mixer: i -> the mixer of layer i, in LLaMA's block; or the blocks themselves.
        embed: tokens -> (B, T, D), in place of an nn.Embedding; one that says its `inputs` names the shape and type of
            what goes in as `tokens`.
        head: (B, T, D) -> (B, T, ...), in place of the linear layer to the vocabulary.
        norm: behind the last block, (B, T, D) -> (B, T, D), in place of an RMSNorm.

    Raises:
        ValueError: a mixer sees the future (its `causal` is False): the next token would not have to be predicted.
    """

    operators = (linear_cross_entropy,)

    def __init__(
        self,
        config: SequenceConfig,
        mixer: Callable[[int], nn.Module] | Iterable[Block],
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config
        d, eps = config.d_model, config.norm_eps

        def feed_forward() -> nn.Module | None:
            return None if config.hidden_size == 0 else SwiGLU(d, hidden_size=config.hidden_size)

        def block(mixer: nn.Module) -> Block:
            scale, dropout = config.residual_scale, config.dropout
            return Block(d, mixer, feed_forward(), norm_eps=eps, residual_scale=scale, dropout=dropout)

        self.embedding = nn.Embedding(config.vocab_size, d) if embed is None else embed
        blocks = (block(mixer(i)) for i in range(config.n_layers)) if callable(mixer) else mixer
        self.blocks = Stack(blocks, causal=True)
        self.norm: nn.Module = RMSNorm(d, eps=eps) if norm is None else norm
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False) if head is None else head
        self._linear_head = head is None
        if config.tie_embeddings:
            if not isinstance(self.lm_head, nn.Linear) or not isinstance(self.embedding, nn.Embedding):
                raise ValueError(
                    "tie_embeddings shares the matrix of an nn.Embedding with an nn.Linear; got "
                    f"{type(self.embedding).__name__} and {type(self.lm_head).__name__}, set tie_embeddings=False"
                )
            self.lm_head.weight = self.embedding.weight
        initialise(self, std=config.init_std, n_layers=config.n_layers)
        self.use_memory(MemoryPlan(recompute="block" if config.activation_checkpointing else "none"))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Tokens; a mask of padding or boundaries of documents may go with them."""
        tokens = Input("tokens", "B T", torch.int64, self.config.vocab_size)
        if isinstance(self.embedding, SaysInputs):
            tokens = self.embedding.inputs[0]._replace(name="tokens")
        return (
            tokens,
            Input("mask", "B T", torch.bool, optional=True),
            Input("cu_seqlens", "n", torch.int64, optional=True),
        )

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self.blocks.memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks keep for the backward pass: no number of the model, and nothing in its checkpoints."""
        self.blocks.use_memory(plan)

    def forward(
        self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Logits of the next token at every position, and the state after the last token.

        Args:
            tokens: (B, T) integers in [0, vocab_size).
            state: what an earlier call returned, or None at the start.
            mask: (B, T) bool, False for padding on either side; padding changes no state and its logits are zeros.
            cu_seqlens: boundaries (n + 1,) of packed documents, B = 1; the state then has n rows.

        Returns:
            logits: (B, T, vocab_size); state: one entry per layer.
        """
        x, state = self.encode(tokens, state, mask=mask, cu_seqlens=cu_seqlens)
        return self.head(x), state

    def encode(
        self, tokens: Tensor, state: Any = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """As `forward`, without the head: the normalised hidden vectors, (B, T, D), and the state."""
        return self._encode(tokens, state, mask, cu_seqlens)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """The hidden vectors of `encode` alone; no layer's state is held, which in attention is all keys and values.

        Args:
            tokens: (B, T) integers in [0, vocab_size).
            cu_seqlens: boundaries (n + 1,) of packed documents, B = 1.
            positions: (B or 1, T), where the tokens stand; else one behind the other.
            visible: which tokens see which, in place of the causal mask.

        Raises:
            ValueError: `visible` for a mixer that does not take it.
        """
        if positions is None and visible is None:
            return self._encode(tokens, None, None, cu_seqlens, keep=False)[0]
        around = Surroundings(cu_seqlens=cu_seqlens, positions=positions, visible=visible)
        x: Tensor = self.blocks(self.embedding(tokens), around=around, final=self.norm, keep=False)[0]
        return x

    def _encode(
        self, tokens: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool = True
    ) -> tuple[Tensor, Any]:
        if tokens.ndim != 2 and isinstance(self.embedding, nn.Embedding):
            raise ValueError(f"tokens must be (B, T); got {tuple(tokens.shape)}")
        x, around = self.embedding(tokens), Surroundings(cu_seqlens=cu_seqlens)
        encoded: tuple[Tensor, Any] = self.blocks(x, state, around=around, mask=mask, final=self.norm, keep=keep)
        return encoded

    def look_ahead(self, tokens: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Prefixes]:
        """Run a ragged window and keep the way back to the state after any prefix of each row.

        Args:
            tokens: (B, W).
            mask: (B, W) bool, False behind a row's tokens; a row may have none.
            state: of B rows, not None.

        Returns:
            hidden vectors (B, W, D), zeros where there is no token; and the prefixes of all layers.
        """
        mask = mask.bool()
        lengths = mask.sum(dim=1)
        rows = Rows(mask, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        x, prefixes = self.embedding(rows.pack(tokens)), []
        for block, block_state in zip(self.blocks.members(), state, strict=True):
            x, block_prefixes = block.look_ahead(x, block_state, cu_seqlens=rows.cu_seqlens)
            prefixes.append(block_prefixes)
        return rows.unpack(self.norm(x)), LayersPrefixes(tuple(prefixes), lengths)

    def head(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab_size)."""
        logits: Tensor = self.lm_head(x)
        return logits

    def head_loss(
        self, x: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto"
    ) -> Tensor:
        """Cross entropy of `head(x)`, without its logits in memory where the head is linear: zoo.layers.head_loss.

        A model that overrides `head` overrides this as well.
        """
        return head_loss(
            self.lm_head, x, targets, ignore_index=ignore_index, reduction=reduction, backend=backend,
            plain=self._linear_head,
        )  # fmt: skip

    def init_state(self, batch: int) -> Any:
        """The state before the first token: what `state=None` stands for."""
        return self.blocks.init_state(batch)

    def reserve(self, state: Any, slots: int) -> Any:
        """The state with room for `slots` tokens a row, for a caller who decodes from it and keeps it to itself.

        Caches that grow with the text are then written in place: what a row has seen stays, what lies behind may
        change. Without it every call copies them. See zoo.layers.state.Reserves.
        """
        return self.blocks.reserve(state, slots)

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of all layers after `length` tokens."""
        return self.blocks.state_bytes(batch, length)
