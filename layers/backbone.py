"""The backbone that every causal sequence model shares: embedding, blocks, norm, head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.conv import ShortConvolution
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Initialises, Mixer
from zoo.layers.model import Input, Model
from zoo.layers.norms import RMSNorm
from zoo.layers.padding import unpadded
from zoo.ops import linear_cross_entropy
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
        mixer: i -> the mixer of layer i.

    Raises:
        ValueError: a mixer sees the future (its `causal` is False): the next token would not have to be predicted.
    """

    operators = (linear_cross_entropy,)

    def __init__(self, config: SequenceConfig, mixer: Callable[[int], nn.Module]):
        super().__init__()
        self.config = config
        d, eps = config.d_model, config.norm_eps

        def feed_forward() -> nn.Module | None:
            return None if config.hidden_size == 0 else SwiGLU(d, hidden_size=config.hidden_size)

        self.embedding = nn.Embedding(config.vocab_size, d)
        self.blocks = nn.ModuleList(
            Block(
                d, mixer(i), feed_forward(), norm_eps=eps, residual_scale=config.residual_scale, dropout=config.dropout
            )
            for i in range(config.n_layers)
        )
        self.norm = RMSNorm(d, eps=eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        for block_mixer in self._mixers():
            if not block_mixer.causal:
                raise ValueError(
                    f"the mixers of a causal model must not see the future, and {type(block_mixer).__name__} does; "
                    "take it out of the pattern, or compose a zoo.layers.Encoder of it"
                )
        self.apply(self._initialise)
        self.use_memory(MemoryPlan(recompute="block" if config.activation_checkpointing else "none"))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Tokens; a mask of padding or boundaries of documents may go with them."""
        return (
            Input("tokens", "B T", torch.int64, self.config.vocab_size),
            Input("mask", "B T", torch.bool, optional=True),
            Input("cu_seqlens", "n", torch.int64, optional=True),
        )

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self._memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks keep for the backward pass: no number of the model, and nothing in its checkpoints."""
        self._memory = plan
        for block in self._blocks():
            block.memory = plan

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | ShortConvolution):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Initialises):  # a mixer with a start of its own; its linear layers came before it
            module.initialise(self.config.n_layers)

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

    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """The hidden vectors of `encode` alone; no layer's state is held, which in attention is all keys and values."""
        return self._encode(tokens, None, None, cu_seqlens, keep=False)[0]

    def _encode(
        self, tokens: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool = True
    ) -> tuple[Tensor, Any]:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (B, T); got {tuple(tokens.shape)}")
        rows = None if mask is None else unpadded(tokens, mask, cu_seqlens)
        if rows is not None:
            x, state = self.encode(rows.pack(tokens), state, cu_seqlens=rows.cu_seqlens)
            return rows.unpack(x), state
        x = self.embedding(tokens)
        states = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, block_state = block(x, block_state, cu_seqlens=cu_seqlens)
            if keep:
                states.append(block_state)
            del block_state
        return self.norm(x), tuple(states)

    def head(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab_size)."""
        logits: Tensor = self.lm_head(x)
        return logits

    def head_loss(
        self, x: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto"
    ) -> Tensor:
        """Cross entropy of `head(x)`, without its logits in memory: zoo.ops.linear_cross_entropy.

        A model that overrides `head` overrides this as well.
        """
        return linear_cross_entropy(
            x, self.lm_head.weight, targets, ignore_index=ignore_index, reduction=reduction, backend=backend
        )

    def init_state(self, batch: int) -> Any:
        """The state before the first token: what `state=None` stands for."""
        return tuple(mixer.init_state(batch) for mixer in self._mixers())

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of all layers after `length` tokens."""
        return sum(mixer.state_bytes(batch, length) for mixer in self._mixers())

    def _mixers(self) -> list[Mixer]:
        return [block.mixer for block in self._blocks()]

    def _blocks(self) -> list[Any]:
        return list(self.blocks)
