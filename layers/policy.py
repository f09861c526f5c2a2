"""Backbones of policies: observations of a robot -> the tokens of a chunk of actions, all at once or one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.block import Block
from zoo.layers.feed_forward import MLP
from zoo.layers.initialise import initialise
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Layer
from zoo.layers.model import Input, Model
from zoo.layers.stack import Stack
from zoo.layers.state import refuse_state
from zoo.ops import shard
from zoo.ranges import Range, check_fields

__all__ = ["AutoregressivePolicy", "Policy", "PolicyConfig", "SlotPolicy"]


WITHOUT_DATA = {"observation_size": 9, "n_slots": 15, "ends": False}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What every policy is told; a model's configuration adds its mixers' fields.

    d_model, n_layers: width and depth.
    hidden_size: of the feed-forward; None for 4 d_model.
    observation_size: numbers of an observation.
    n_slots: tokens of a chunk, the longest where they differ.
    vocab_size: different tokens.
    ends: the last token of the vocabulary ends a chunk.
        What is None is decided by the data; without data it is 9, 15 and False, as data=reaching has it.
    dropout: share of the numbers that each part of a block adds which is dropped in training.
    norm_eps: of all norms.
    init_std: standard deviation of every linear and embedding weight, and of the slots.
    """

    d_model: Annotated[int, Range(1)] = 256
    n_layers: Annotated[int, Range(1, 10_000)] = 6
    hidden_size: Annotated[int | None, Range(1)] = None
    observation_size: Annotated[int | None, Range(1)] = None
    n_slots: Annotated[int | None, Range(1)] = None
    vocab_size: Annotated[int, Range(2)] = 256
    ends: bool | None = None
    dropout: Annotated[float, Range(0, below=1)] = 0.1
    norm_eps: Annotated[float, Range(0)] = 1e-5
    init_std: Annotated[float, Range(0)] = 0.02

    def __post_init__(self) -> None:
        for name, value in WITHOUT_DATA.items():
            if vars(self)[name] is None:
                object.__setattr__(self, name, value)
        check_fields(self)


class ObservationEmbedding(nn.Module):
    """Two linear layers with gelu between, for every observation by itself: (B, S, O) -> (B, S, D)."""

    def __init__(self, observation_size: int, d_model: int):
        super().__init__()
        self.up_proj = nn.Linear(observation_size, d_model)
        self.down_proj = nn.Linear(d_model, d_model)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations as vectors of the model's width."""
        embedded: Tensor = self.down_proj(F.gelu(self.up_proj(observations)))
        return embedded


class Slots(Layer):
    """One learnt vector for every token of a chunk."""

    def __init__(self, n_slots: int, d_model: int, *, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(n_slots, d_model))
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start normal with the model's standard deviation."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, batch: int) -> Tensor:
        """(B, J, D), the same for every row."""
        return self.weight.expand(batch, -1, -1)


class Policy(Model):
    """What is shared: observations, blocks, a head over the tokens of a chunk.

    A subclass gives `forward`, and `act`, by which a robot is driven.

    Args:
        config: a PolicyConfig.
        mixer: i -> the mixer of layer i.
    """

    unit = "chunk"
    config: PolicyConfig

    def __init__(self, config: PolicyConfig, mixer: Callable[[int], nn.Module]):
        super().__init__()
        self.config, d = config, config.d_model
        assert config.observation_size is not None
        assert config.n_slots is not None
        self.observation_size, self.n_slots = config.observation_size, config.n_slots
        self.observation_embedding = ObservationEmbedding(config.observation_size, d)
        self.blocks = Stack(
            (
                Block(
                    d,
                    mixer(i),
                    MLP(d, hidden_size=config.hidden_size),
                    norm=lambda width: nn.LayerNorm(width, eps=config.norm_eps),
                    dropout=config.dropout,
                )
                for i in range(config.n_layers)
            ),
            causal=self.causal,
        )
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.head = nn.Linear(d, config.vocab_size)

    def act(self, observations: Tensor) -> Tensor:
        """The tokens of the chunk to do next, (B, n_slots) int64, the likeliest ones.

        Args:
            observations: (B, S, observation_size).
        """
        raise NotImplementedError(f"{type(self).__name__} says what it does by act(observations)")

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self.blocks.memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks keep for the backward pass."""
        self.blocks.use_memory(plan)

    def units(self, batch: Any) -> int:
        """Chunks of a batch: one for each row."""
        return len(batch["observations"])

    def block_shape(self, batch: Any) -> tuple[int, int]:
        """Observations and tokens go through the blocks in one row."""
        rows, seen, _ = batch["observations"].shape
        return int(rows), int(seen) + self.n_slots

    def embedded(self, observations: Tensor) -> Tensor:
        """(B, S, O) -> (B, S, D).

        Raises:
            ValueError: the observations have another size; or time is cut across ranks.
        """
        shard.refuse("A policy")
        if observations.ndim != 3 or observations.shape[2] != self.observation_size:
            raise ValueError(f"observations must be (B, S, {self.observation_size}); got {tuple(observations.shape)}")
        embedded: Tensor = self.observation_embedding(observations)
        return embedded


class SlotPolicy(Policy):
    """All tokens of a chunk in one pass: learnt slots beside the observations, and all see all.

    Source: BEAST-D of arXiv 2506.06072.
    """

    causal = False

    def __init__(self, config: PolicyConfig, mixer: Callable[[int], nn.Module]):
        super().__init__(config, mixer)
        self.slots = Slots(self.n_slots, config.d_model, std=config.init_std)
        initialise(self, std=config.init_std, n_layers=config.n_layers)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The last observations, the newest at the end."""
        return (Input("observations", "B S O", torch.float32),)

    def sizes(self, batch: int, length: int) -> dict[str, int]:
        """One observation, whatever the length."""
        return {"B": batch, "S": 1, "O": self.observation_size}

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Tensor, None]:
        """Logits of all tokens of the next chunk.

        Args:
            observations: (B, S, observation_size).
            state: None; it is there because causal models have one.

        Returns:
            logits: (B, n_slots, vocab_size); and None.
        """
        refuse_state(type(self).__name__, state)
        x = self.embedded(observations)
        seen = x.shape[1]
        x, _ = self.blocks(torch.cat([x, self.slots(len(x))], 1), final=self.norm, keep=False)
        logits: Tensor = self.head(x[:, seen:])
        return logits, None

    def act(self, observations: Tensor) -> Tensor:
        """The likeliest token of every slot, (B, n_slots) int64."""
        chosen: Tensor = self(observations)[0].argmax(-1)
        return chosen


class AutoregressivePolicy(Policy):
    """One token of a chunk after the other, behind the observations, through causal mixers."""

    causal = True

    def __init__(self, config: PolicyConfig, mixer: Callable[[int], nn.Module]):
        super().__init__(config, mixer)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        initialise(self, std=config.init_std, n_layers=config.n_layers)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The last observations, and the tokens of the chunk, of which each is predicted from those before it."""
        return (
            Input("observations", "B S O", torch.float32),
            Input("tokens", "B J", torch.int64, self.config.vocab_size),
        )

    def sizes(self, batch: int, length: int) -> dict[str, int]:
        """One observation, whatever the length."""
        return {"B": batch, "S": 1, "O": self.observation_size, "J": self.n_slots}

    def forward(self, observations: Tensor, state: Any = None, *, tokens: Tensor) -> tuple[Tensor, None]:
        """Logits of every token from the observations and the tokens before it.

        Args:
            observations: (B, S, observation_size).
            state: None: a chunk goes in as a whole; `act` goes on by itself.
            tokens: (B, n_slots) integers in [0, vocab_size).

        Returns:
            logits: (B, n_slots, vocab_size); and None.
        """
        refuse_state(type(self).__name__, state)
        x = self.embedded(observations)
        seen = x.shape[1]
        x, _ = self.blocks(torch.cat([x, self.embedding(tokens[:, :-1])], 1), final=self.norm, keep=False)
        logits: Tensor = self.head(x[:, seen - 1 :])
        return logits, None

    def act(self, observations: Tensor) -> Tensor:
        """The likeliest token after the likeliest ones before it, (B, n_slots) int64; behind an end comes the end."""
        end = self.config.vocab_size - 1
        x, state = self.blocks(self.embedded(observations), final=self.norm)
        tokens: list[Tensor] = []
        ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        while len(tokens) < self.n_slots:
            token = self.head(x[:, -1:]).argmax(-1)  # (B, 1)
            if self.config.ends:
                token = torch.where(ended[:, None], end, token)
                ended = ended | (token[:, 0] == end)
            tokens.append(token)
            if bool(ended.all()):
                break
            x, state = self.blocks(self.embedding(token), state, final=self.norm)
        chunk = torch.cat(tokens, 1)
        return F.pad(chunk, (0, self.n_slots - chunk.shape[1]), value=end)
