"""The backbone of models that see both sides of every token: embeddings, layers, a head for tokens or for classes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.block import Block
from zoo.layers.dropout import Dropout
from zoo.layers.head_loss import head_loss
from zoo.layers.initialise import initialise
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Surroundings
from zoo.layers.model import Input, Model, SaysInputs
from zoo.layers.pooling import Pooling, pooled
from zoo.layers.stack import Stack
from zoo.layers.state import refuse_state
from zoo.ops import linear_cross_entropy
from zoo.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What every Encoder is told; a model's configuration adds its mixer's fields.

    d_model, n_layers, vocab_size: width, depth, number of tokens.
    n_token_types: number of kinds of tokens (sentence A, sentence B).
    n_classes: None for a head that predicts tokens; otherwise one that tells so many classes of whole sequences apart.
    pooling: what such a head sees: the "first" token, or the "mean" over all.
    pattern: mixers by layer in the grammar of zoo.layers.pattern; empty for the model's own mixer everywhere.
    prenorm: x + mixer(norm(x)) and a norm at the end; otherwise norm(x + mixer(x)).
    dropout: after the embeddings, and before the classes.
    norm_eps: of the layers' norms.
    outer_norm_eps: of the norms of embeddings and head, and of the one at the end.
    init_std: standard deviation of every linear and embedding weight; a mixer with a method `initialise(n_layers)`
        starts as that says.
    activation_checkpointing: recompute each layer in the backward pass and keep only its input.
    """

    d_model: Annotated[int, Range(1)] = 128
    n_layers: Annotated[int, Range(1, 10_000)] = 4
    vocab_size: Annotated[int, Range(1)] = 30522
    n_token_types: Annotated[int, Range(1)] = 2
    n_classes: Annotated[int | None, Range(2)] = None
    pooling: Pooling = "first"
    pattern: str = ""
    prenorm: bool = False
    dropout: Annotated[float, Range(0, below=1)] = 0.1
    norm_eps: Annotated[float, Range(0)] = 1e-5
    outer_norm_eps: Annotated[float, Range(0)] = 1e-12
    init_std: Annotated[float, Range(0)] = 0.02
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_classes is None and self.pooling != "first":
            raise ValueError(
                f"pooling is for whole sequences, and a head for tokens has none; got pooling={self.pooling!r}, give "
                "n_classes or leave it out"
            )


class Embeddings(nn.Module):
    """LayerNorm(word + token type); positions are the mixers' to find."""

    def __init__(self, vocab_size: int, n_token_types: int, d_model: int, *, norm_eps: float, dropout: float):
        super().__init__()
        self.word = nn.Embedding(vocab_size, d_model)
        self.token_type = nn.Embedding(n_token_types, d_model)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, token_types: Tensor | None) -> Tensor:
        """Tokens (B, T), and their types, -> normalised vectors (B, T, D)."""
        types = self.token_type.weight[0] if token_types is None else self.token_type(token_types)
        embedded: Tensor = self.dropout(self.norm(self.word(tokens) + types))
        return embedded


class EncoderLayer(Block):
    """norm(x + mixer(x)), or with `prenorm` x + mixer(norm(x)): a Block whose norm is a LayerNorm called `norm`.

    Args:
        d_model: D.
        mixer: a zoo.layers.Mixer; whatever state it makes is dropped. Where a padded batch is cut across ranks it is
            called row by row.
        prenorm: where the norm stands.
        norm_eps: of the norm.
    """

    norm: nn.Module

    def __init__(self, d_model: int, mixer: nn.Module, *, prenorm: bool = False, norm_eps: float = 1e-5):
        super().__init__(d_model, mixer, None, norm=partial(nn.LayerNorm, eps=norm_eps), post_norm=not prenorm)
        own = self._modules.pop("mixer_norm")
        assert own is not None
        self.norm = own  # as checkpoints call it

    @property
    def mixer_norm(self) -> nn.Module:  # type: ignore[override]
        """The layer's only norm, before or behind the mixer."""
        return self.norm


class MaskedTokenHead(nn.Module):
    """BERT's: LayerNorm(gelu(W x + b)) E^T + c with the embedding's matrix E."""

    def __init__(self, embedding: nn.Embedding, *, norm_eps: float):
        super().__init__()
        vocab_size, d_model = embedding.weight.shape
        self.dense = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.decoder = nn.Linear(d_model, vocab_size)
        self.decoder.weight = embedding.weight

    def transform(self, x: Tensor) -> Tensor:
        """All but the last product."""
        transformed: Tensor = self.norm(F.gelu(self.dense(x)))
        return transformed

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, vocab_size)."""
        logits: Tensor = self.decoder(self.transform(x))
        return logits


class SequenceHead(nn.Module):
    """A head of whole sequences, `head(x, mask, cu_seqlens)`: one row of outputs for each.

    x: (B, T, D), or (1, T, D) with n packed documents; outputs are (B, ...), or (n, ...).
    mask: (B, T) bool, False for padding, or None. cu_seqlens: boundaries (n + 1,) of packed documents, or None.
    """

    forward: Callable[..., Tensor]
    __call__: Callable[..., Tensor]


class ClassificationHead(SequenceHead):
    """One row of logits per sequence: W_c tanh(W_p pooled + b_p) + b_c."""

    def __init__(self, d_model: int, n_classes: int, *, pooling: Pooling, dropout: float):
        super().__init__()
        self.pooling = pooling
        self.pooler = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        self.classes = nn.Linear(d_model, n_classes)

    def forward(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """(B, T, D), or (1, T, D) with n documents -> (B or n, n_classes). An empty sequence counts as zeros.

        Where time is cut across ranks, every rank gives the logits of all whole sequences.
        """
        one = pooled(x, self.pooling, mask, cu_seqlens)
        logits: Tensor = self.classes(self.dropout(torch.tanh(self.pooler(one))))
        return logits


class Encoder(Model):
    """Tokens -> logits of every token or of every sequence, through mixers that see both sides.

    It follows the contract of models, `model(tokens) -> (logits, state)`, with None for a state: the whole sequence
    goes in at once. `causal` is False, by which tasks and decoding know it.

    Args:
        config: an EncoderConfig.
        mixer: i -> the mixer of layer i.
        embed: tokens -> (B, T, D), in place of words and token types; one that says its `inputs` names the shape and
            type of what goes in as `tokens`.
        head: (B, T, D) -> (B, T, ...), in place of the head for tokens; a SequenceHead in place of that for classes.

    Raises:
        ValueError: the config asks for classes, or the masked tokens' head for the matrix of an embedding, that is not
            there.
    """

    causal = False
    operators = (linear_cross_entropy,)
    embeddings: nn.Module
    lm_head: nn.Module | None
    classifier: SequenceHead | None

    def __init__(
        self,
        config: EncoderConfig,
        mixer: Callable[[int], nn.Module],
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config
        d, outer = config.d_model, config.outer_norm_eps
        words: Embeddings | None = None
        if embed is None:
            words = Embeddings(config.vocab_size, config.n_token_types, d, norm_eps=outer, dropout=config.dropout)
            self.embeddings = words
        else:
            self.embeddings = embed
        self.blocks = Stack(
            EncoderLayer(d, mixer(i), prenorm=config.prenorm, norm_eps=config.norm_eps) for i in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(d, eps=outer) if config.prenorm else None
        self.lm_head = self.classifier = None
        if head is not None:
            if config.n_classes is not None:
                raise ValueError(
                    f"a head of one's own says by itself what it tells apart; got {type(head).__name__} and n_classes="
                    f"{config.n_classes}, leave one of them out"
                )
            self.lm_head, self.classifier = (None, head) if isinstance(head, SequenceHead) else (head, None)
        elif config.n_classes is None:
            if words is None:
                raise ValueError(
                    "the head for masked tokens shares the matrix of the encoder's own embedding; got embed="
                    f"{type(embed).__name__} without a head, give head= or n_classes"
                )
            self.lm_head = MaskedTokenHead(words.word, norm_eps=outer)
        else:
            self.classifier = ClassificationHead(d, config.n_classes, pooling=config.pooling, dropout=config.dropout)
        initialise(self, std=config.init_std, n_layers=config.n_layers, convolutions=False)
        self.use_memory(MemoryPlan(recompute="block" if config.activation_checkpointing else "none"))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Tokens; a mask of padding or boundaries of documents, and kinds of tokens, may go with them."""
        tokens = Input("tokens", "B T", torch.int64, self.config.vocab_size)
        types = Input("token_types", "B T", torch.int64, self.config.n_token_types, optional=True)
        if isinstance(self.embeddings, SaysInputs):
            tokens = self.embeddings.inputs[0]._replace(name="tokens")
        return (
            tokens,
            Input("mask", "B T", torch.bool, optional=True),
            Input("cu_seqlens", "n", torch.int64, optional=True),
            *((types,) if isinstance(self.embeddings, Embeddings) else ()),
        )

    @property
    def memory(self) -> MemoryPlan:
        """What layers keep for the backward pass."""
        return self.blocks.memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what layers keep for the backward pass: no number of the model, and nothing in its checkpoints."""
        self.blocks.use_memory(plan)

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Logits of the token at every position, or of the class of every sequence.

        Args:
            tokens: (B, T) integers in [0, vocab_size).
            state: None; it is there because causal models have one.
            mask: (B, T) bool, False for padding on either side; padding reaches no token, and its logits are the head's
                of zeros.
            cu_seqlens: boundaries (n + 1,) of packed documents, B = 1, that do not see each other.
            token_types: (B, T) integers in [0, n_token_types); zeros when omitted.

        Returns:
            logits: (B, T, vocab_size); with n_classes (B, n_classes), or (n, n_classes) of packed documents; and None.
        """
        x, _ = self.encode(tokens, state, mask=mask, cu_seqlens=cu_seqlens, token_types=token_types)
        return self.head(x, mask=mask, cu_seqlens=cu_seqlens), None

    def encode(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As `forward`, without the head: the hidden vectors, (B, T, D), zeros at the padding."""
        refuse_state(type(self).__name__, state)
        if isinstance(self.embeddings, Embeddings):
            if tokens.ndim != 2:
                raise ValueError(f"tokens must be (B, T); got {tuple(tokens.shape)}")
            x = self.embeddings(tokens, token_types)
        elif token_types is not None:
            raise ValueError(
                "token_types are for the encoder's own embeddings; this model embeds by "
                f"{type(self.embeddings).__name__}, leave them out"
            )
        else:
            x = self.embeddings(tokens)
        x, _ = self.blocks(x, around=Surroundings(cu_seqlens=cu_seqlens), mask=mask, final=self.norm, keep=False)
        # A tensor of its own, not the last block's: FSDP hangs hooks on both, which must fire in one order on all
        # ranks, with padding on some or none.
        return x.view_as(x), None

    def head(self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The logits of what `encode` returned; a head for tokens looks at each alone, at any (..., D)."""
        if self.lm_head is not None:
            logits: Tensor = self.lm_head(x)
            return logits
        assert self.classifier is not None
        logits = self.classifier(x, None if mask is None else mask.bool(), cu_seqlens)
        return logits

    def head_loss(
        self, x: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto"
    ) -> Tensor:
        """Cross entropy of the tokens' logits, without these in memory: zoo.ops.linear_cross_entropy.

        Raises:
            ValueError: the model tells classes apart.
        """
        if self.lm_head is None:
            raise ValueError("head_loss is that of a head for tokens, and this model has n_classes; take the logits")
        last, masked = self.lm_head, isinstance(self.lm_head, MaskedTokenHead)
        if isinstance(self.lm_head, MaskedTokenHead):
            last, x = self.lm_head.decoder, self.lm_head.transform(x)
        return head_loss(
            last, x, targets, ignore_index=ignore_index, reduction=reduction, backend=backend, plain=masked
        )
