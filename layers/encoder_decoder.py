"""The backbone of models that turn one sequence into another: an encoder, and a causal decoder that looks at it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.dropout import Dropout
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.head_loss import head_loss
from zoo.layers.initialise import initialise
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Mixer, Surroundings
from zoo.layers.model import Input, Model, SaysInputs
from zoo.layers.norms import RMSNorm
from zoo.layers.stack import Stack
from zoo.ops import linear_cross_entropy, shard
from zoo.ranges import Range, check_fields

__all__ = ["EncoderDecoder", "EncoderDecoderConfig"]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """What every EncoderDecoder is told; a model's configuration adds its mixers' fields.

    d_model: width of both stacks.
    n_layers, n_encoder_layers: depth of the decoder, and of the encoder; None for as many.
    vocab_size, source_vocab_size: number of tokens; None for one embedding of both sequences.
    hidden_size: of the SwiGLU; None for LLaMA's rule, 0 for no feed-forward.
    tie_embeddings: the head uses the embedding's matrix.
    norm_eps: of all norms.
    dropout: share of the numbers that each part of a block adds which is dropped in training, and of the embeddings.
    init_std: standard deviation of every linear and embedding weight.
    activation_checkpointing: recompute each block in the backward pass and keep only its input.
    """

    d_model: Annotated[int, Range(1)] = 128
    n_layers: Annotated[int, Range(1, 10_000)] = 4
    n_encoder_layers: Annotated[int | None, Range(1, 10_000)] = None
    vocab_size: Annotated[int, Range(1)] = 32000
    source_vocab_size: Annotated[int | None, Range(1)] = None
    hidden_size: Annotated[int | None, Range(0)] = None
    tie_embeddings: bool = False
    norm_eps: Annotated[float, Range(0)] = 1e-6
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    init_std: Annotated[float, Range(0)] = 0.02
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


class EncoderDecoder(Model):
    """Source tokens and earlier target tokens -> logits of the next target token.

    The decoder's state holds what its mixers remember and the keys of the source. So the source is given in the first
    call, and later calls go on from the state alone.

    Args:
        config: an EncoderDecoderConfig.
        encoder_mixer: i -> the mixer of layer i of the encoder.
        decoder_mixer: i -> the mixer of layer i of the decoder, which must be causal.
        cross: i -> what looks at the encoder in layer i of the decoder, a zoo.layers.CrossAttention.
        embed: tokens of either sequence -> (B, T, D), in place of an nn.Embedding.
        source_embed: the source -> (B, S, D), where it is embedded in another way than the target: frames of speech, or
            a picture's patches. One that says its `inputs` names the shape and type of what goes in as `source`.
        head: (B, T, D) -> (B, T, ...), in place of the linear layer to the vocabulary.

    Raises:
        ValueError: a mixer of the decoder sees the future.
    """

    operators = (linear_cross_entropy,)

    def __init__(
        self,
        config: EncoderDecoderConfig,
        encoder_mixer: Callable[[int], nn.Module],
        decoder_mixer: Callable[[int], nn.Module],
        cross: Callable[[int], Mixer],
        *,
        embed: nn.Module | None = None,
        source_embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.config, d = config, config.d_model
        depth = config.n_layers if config.n_encoder_layers is None else config.n_encoder_layers
        self.embedding = nn.Embedding(config.vocab_size, d) if embed is None else embed
        self.source_embedding = source_embed
        if source_embed is None and config.source_vocab_size is not None:
            self.source_embedding = nn.Embedding(config.source_vocab_size, d)
        self.dropout = Dropout(config.dropout)
        self.encoder = Stack(self._block(encoder_mixer(i), None) for i in range(depth))
        self.encoder_norm = RMSNorm(d, eps=config.norm_eps)
        self.blocks = Stack((self._block(decoder_mixer(i), cross(i)) for i in range(config.n_layers)), causal=True)
        self.norm = RMSNorm(d, eps=config.norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False) if head is None else head
        self._linear_head = head is None
        if config.tie_embeddings:
            if not isinstance(self.lm_head, nn.Linear) or not isinstance(self.embedding, nn.Embedding):
                raise ValueError("tie_embeddings shares the matrix of an nn.Embedding with an nn.Linear; leave it out")
            self.lm_head.weight = self.embedding.weight
        initialise(self, std=config.init_std, n_layers=depth + config.n_layers)
        self.use_memory(MemoryPlan(recompute="block" if config.activation_checkpointing else "none"))

    def _block(self, mixer: nn.Module, cross: Mixer | None) -> Block:
        config = self.config
        fed = None if config.hidden_size == 0 else SwiGLU(config.d_model, hidden_size=config.hidden_size)
        return Block(config.d_model, mixer, fed, norm_eps=config.norm_eps, dropout=config.dropout, cross=cross)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Target tokens, the source, and how long its rows are."""
        tokens = Input("tokens", "B T", torch.int64, self.config.vocab_size)
        source = Input("source", "B S", torch.int64, self.config.source_vocab_size or self.config.vocab_size)
        if isinstance(self.embedding, SaysInputs):
            tokens = self.embedding.inputs[0]._replace(name="tokens")
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        if isinstance(embedding, SaysInputs):
            shape = embedding.inputs[0].shape
            source = embedding.inputs[0]._replace(
                name="source", shape=" ".join("S" if n == "T" else n for n in shape.split())
            )
        return (
            tokens,
            source,
            Input("source_lengths", "B", torch.int64, optional=True),
        )

    def sizes(self, batch: int, length: int) -> dict[str, int]:
        """A source as long as the target."""
        return {"B": batch, "T": length, "S": length}

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self.blocks.memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks of both stacks keep for the backward pass: no number of the model."""
        self.encoder.use_memory(plan)
        self.blocks.use_memory(plan)

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits of the next target token at every position, and the state after the last one.

        Args:
            tokens: (B, T) integers in [0, vocab_size), of the target.
            state: what an earlier call or `begin` returned, or None.
            source: (B, S) integers in [0, source_vocab_size), in the first call only.
            source_lengths: (B,) integers in [1, S], vectors of each embedded source that count, from the left; all when
                omitted.

        Returns:
            logits: (B, T, vocab_size); state: one entry per layer of the decoder.

        Raises:
            ValueError: neither or both of a source and a state that has read one; or time is cut across ranks.
        """
        x, state = self.encode(tokens, state, source=source, source_lengths=source_lengths)
        return self.head(x), state

    def encode(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """As `forward`, without the head: the normalised hidden vectors of the decoder, (B, T, D), and the state."""
        if tokens.ndim != 2 and isinstance(self.embedding, nn.Embedding):
            raise ValueError(f"tokens must be (B, T); got {tuple(tokens.shape)}")
        around = Surroundings()
        read = state is not None and self._has_read(state)
        if source is not None:
            if read:
                raise ValueError("the state has read its source already; leave source out, or begin without a state")
            around = Surroundings(memory=self.read(source, source_lengths), memory_lengths=source_lengths)
        elif not read:
            raise ValueError(
                "an encoder-decoder needs its source in the first call; got neither a source nor a state that has read "
                "one, give source=... or a state by begin(source)"
            )
        x = self.dropout(self.embedding(tokens))
        encoded: tuple[Tensor, Any] = self.blocks(x, state, around=around, final=self.norm)
        return encoded

    def read(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """What the encoder makes of the source, (B, S, D), zeros behind each row's length."""
        shard.refuse("An encoder-decoder")
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        if source.ndim != 2 and isinstance(embedding, nn.Embedding):
            raise ValueError(f"source must be (B, S); got {tuple(source.shape)}")
        x, mask = self.dropout(embedding(source)), None
        if source_lengths is not None:  # of what is embedded
            mask = torch.arange(x.shape[1], device=x.device) < source_lengths.unsqueeze(1)
        memory: Tensor = self.encoder(x, mask=mask, final=self.encoder_norm, keep=False)[0]
        return memory

    def begin(self, source: Tensor, source_lengths: Tensor | None = None) -> Any:
        """The state before the first target token, with the source read: `model(tokens, model.begin(source))`."""
        around = Surroundings(memory=self.read(source, source_lengths), memory_lengths=source_lengths)
        memory = around.memory
        assert memory is not None
        nothing = memory[:, :0]
        return self.blocks(nothing, self.init_state(len(source)), around=around)[1]

    def _has_read(self, state: Any) -> bool:
        """The cross attention of a state has keys."""
        return bool(state[0].cross.k.shape[1])

    def head(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab_size)."""
        logits: Tensor = self.lm_head(x)
        return logits

    def head_loss(
        self, x: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto"
    ) -> Tensor:
        """Cross entropy of `head(x)`, without its logits in memory where the head is linear: zoo.layers.head_loss."""
        return head_loss(
            self.lm_head, x, targets, ignore_index=ignore_index, reduction=reduction, backend=backend,
            plain=self._linear_head,
        )  # fmt: skip

    def init_state(self, batch: int) -> Any:
        """The state before the first token and before the source: what `state=None` stands for."""
        return self.blocks.init_state(batch)

    def reserve(self, state: Any, slots: int) -> Any:
        """The state with room for `slots` target tokens a row, as of SequenceModel."""
        return self.blocks.reserve(state, slots)

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state after `length` target tokens, with a source as long."""
        return self.blocks.state_bytes(batch, length)
