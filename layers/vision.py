"""The backbone of models that see pictures: patches, stages of blocks, down-sampling, pooling, a head for classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers.block import Block
from zoo.layers.dropout import Dropout
from zoo.layers.feed_forward import MLP
from zoo.layers.initialise import initialise
from zoo.layers.memory import MemoryPlan
from zoo.layers.mixer import Surroundings
from zoo.layers.model import Input, Model
from zoo.layers.patches import Downsample, PatchEmbedding, Positions
from zoo.layers.stack import Stack
from zoo.layers.state import refuse_state
from zoo.ops import shard
from zoo.ranges import Range, check_fields

__all__ = ["Features", "VisionConfig", "VisionModel"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What every VisionModel is told; a model's configuration adds its mixer's fields.

    d_model, n_layers: width and depth; of the first stage and of all stages where there are several.
    depths: blocks of every stage; empty for one stage of n_layers. Each later stage has half the rows and columns of
        patches and twice the width.
    image_size: rows and columns of the pictures that learnt positions are made for; other sizes interpolate them.
    patch_size: rows and columns of a patch.
    channels: of a picture.
    n_classes: 0 for no head: the outputs are then the pooled vectors.
    pooling: what the head sees: "token", a learnt vector in front of the patches, or the "mean" over the patches.
    positions: "learned", a vector for every patch, or "none" where the mixers find them.
    hidden_size: of the feed-forward; None for 4 d_model, 0 for no feed-forward.
    dropout: of what every part of a block adds, and of the embedded patches.
    drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
    norm_eps: of all norms.
    init_std: standard deviation of every linear weight and position.
    features_only: the outputs are maps of features, `Features`, and there is no head.
    out_indices: of which stages, or of which blocks where there is one stage, negative ones from the end; empty for
        all stages, or the last block.
    activation_checkpointing: recompute each block in the backward pass and keep only its input.
    """

    d_model: Annotated[int, Range(1)] = 192
    n_layers: Annotated[int, Range(1, 10_000)] = 12
    depths: Annotated[tuple[int, ...], Range(1, 10_000)] = ()
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 16
    channels: Annotated[int, Range(1)] = 3
    n_classes: Annotated[int, Range(0)] = 1000
    pooling: Literal["token", "mean"] = "token"
    positions: Literal["learned", "none"] = "learned"
    hidden_size: Annotated[int | None, Range(0)] = None
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    drop_path: Annotated[float, Range(0, below=1)] = 0.0
    norm_eps: Annotated[float, Range(0)] = 1e-6
    init_std: Annotated[float, Range(0)] = 0.02
    features_only: bool = False
    out_indices: tuple[int, ...] = ()
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.image_size % self.reduction:
            raise ValueError(
                f"image_size must be a multiple of {self.reduction}, patch_size times 2 for every stage after the "
                f"first; got {self.image_size}"
            )
        if self.depths and self.pooling == "token":
            raise ValueError("pooling='token' is for one stage, since down-sampling joins patches; use pooling='mean'")
        if self.depths and self.n_layers != sum(self.depths):
            raise ValueError(
                f"n_layers must be the sum of depths = {sum(self.depths)}, or the other way round; got {self.n_layers}"
            )
        if self.out_indices and not self.features_only:
            raise ValueError(f"out_indices = {self.out_indices} choose maps of features; set features_only=true")
        places = len(self.stages) if self.depths else self.n_layers
        for index in self.out_indices:
            if not -places <= index < places:
                raise ValueError(f"out_indices must be in [{-places}, {places}); got {index}")

    @property
    def stages(self) -> tuple[int, ...]:
        """Blocks of every stage."""
        return self.depths or (self.n_layers,)

    @property
    def reduction(self) -> int:
        """Rows and columns of pixels that one vector of the last stage stands for."""
        return int(self.patch_size * 2 ** (len(self.stages) - 1))

    def width(self, stage: int) -> int:
        """D of a stage."""
        return int(self.d_model * 2**stage)

    def stage_of(self, layer: int) -> int:
        """The stage of a block."""
        return next(s for s in range(len(self.stages)) if layer < sum(self.stages[: s + 1]))


class Features(NamedTuple):
    """Maps of features, (B, D, rows, columns) each, in the order of `out_indices`."""

    maps: tuple[Tensor, ...]


class VisionModel(Model):
    """Pictures (B, C, H, W) -> logits (B, n_classes), or maps of features; any H and W that the patches divide.

    Args:
        config: a VisionConfig.
        mixer: i -> the mixer of layer i, of width config.width(config.stage_of(i)).
        embed: pictures -> (B, D, rows, columns), in place of a convolution over patches.
        head: (B, D) -> (B, ...), in place of the linear layer to the classes.

    `Surroundings.grid` tells the mixers rows and columns, where no token stands in front of the patches.
    """

    causal = False
    unit = "image"

    def __init__(
        self,
        config: VisionConfig,
        mixer: Callable[[int], nn.Module],
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.config, d = config, config.d_model
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        self.embedding = PatchEmbedding(config.channels, d, config.patch_size) if embed is None else embed
        self.class_token = nn.Parameter(torch.empty(1, 1, d)) if config.pooling == "token" else None
        side, extra = config.image_size // config.patch_size, config.pooling == "token"
        self.positions = Positions(side, d, extra=int(extra)) if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout)
        self.blocks = Stack(self._block(i, mixer(i), norm) for i in range(config.n_layers))
        if self.class_token is not None and all(mixer.causal for mixer in self.blocks.mixers()):
            raise ValueError(
                "a token in front of the patches sees none of them through causal mixers; use pooling='mean', or a "
                "mixer that sees both sides"
            )
        self.downsamples = nn.ModuleList(self._downsample(config.width(s)) for s in range(len(config.stages) - 1))
        last = config.width(len(config.stages) - 1)
        self.norm = None if config.features_only else norm(last)
        self.head: nn.Module | None = None
        if not config.features_only:
            self.head = head or (nn.Linear(last, config.n_classes) if config.n_classes else nn.Identity())
        initialise(self, std=config.init_std, n_layers=config.n_layers)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=1e-6)
        self.use_memory(MemoryPlan(recompute="block" if config.activation_checkpointing else "none"))

    def _downsample(self, d: int) -> nn.Module:
        """Between two stages: (x (B, N, D), grid) -> (x (B, N / 4, 2 D), grid)."""
        return Downsample(d, eps=self.config.norm_eps)

    def _block(self, i: int, mixer: nn.Module, norm: Callable[[int], nn.Module]) -> Block:
        config = self.config
        d = config.width(config.stage_of(i))
        fed = config.hidden_size if config.hidden_size is None else config.hidden_size * 2 ** config.stage_of(i)
        return Block(
            d, mixer, None if fed == 0 else MLP(d, hidden_size=fed), norm=norm, dropout=config.dropout,
            drop_path=config.drop_path * i / max(1, config.n_layers - 1),
        )  # fmt: skip

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Pictures; another size than `image_size` is taken as well."""
        return (Input("images", "B C H W", torch.float32),)

    def sizes(self, batch: int, length: int) -> dict[str, int]:
        """Pictures of the model's own size; `length` is not looked at."""
        side = self.config.image_size
        return {"B": batch, "C": self.config.channels, "H": side, "W": side}

    def units(self, batch: Any) -> int:
        """Pictures of a batch, which the throughput counts."""
        return int(batch["images"].shape[0])

    def block_shape(self, batch: Any) -> tuple[int, int]:
        """Pictures, and the vectors of each in the first stage."""
        rows, _, H, W = batch["images"].shape
        side = self.config.patch_size
        return int(rows), int(H) // side * (int(W) // side) + (self.class_token is not None)

    @property
    def memory(self) -> MemoryPlan:
        """What blocks keep for the backward pass."""
        return self.blocks.memory

    def use_memory(self, plan: MemoryPlan) -> None:
        """Change what blocks keep for the backward pass: no number of the model, and nothing in its checkpoints."""
        self.blocks.use_memory(plan)

    def forward(self, images: Tensor, state: Any = None) -> tuple[Tensor | Features, None]:
        """Logits of every picture, or maps of features.

        Args:
            images: (B, C, H, W) floats; H and W are multiples of `config.reduction`.
            state: None; it is there because causal models have one.

        Returns:
            (B, n_classes), or `Features` with features_only; and None.
        """
        refuse_state(type(self).__name__, state)
        if self.head is None or self.norm is None:
            return Features(tuple(self.intermediates(images, self.config.out_indices))), None
        x, _ = self._run(images, (), self.config.n_layers)
        logits: Tensor = self.head(self.pool(self.norm(x)))
        return logits, None

    def intermediates(self, images: Tensor, indices: Sequence[int] = ()) -> list[Tensor]:
        """Maps (B, D, rows, columns) behind the chosen stages, or behind the chosen blocks of a single stage.

        Args:
            images: as of `forward`.
            indices: negative ones count from the end; none for all stages, or the last block.
        """
        several, ends = bool(self.config.depths), self._ends()
        places = ends if several else list(range(1, self.config.n_layers + 1))
        chosen = [places[i] for i in (indices or (range(len(ends)) if several else (-1,)))]
        _, maps = self._run(images, chosen, max(chosen))
        return [maps[place] for place in chosen]

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D): the token in front, or the mean."""
        return x[:, 0] if self.class_token is not None else x.mean(dim=1)

    @property
    def num_features(self) -> int:
        """Width of what the head sees."""
        return int(self.config.width(len(self.config.stages) - 1))

    def reset_classifier(self, n_classes: int) -> None:
        """Put a fresh head for so many classes in place of the old one; none for 0.

        Raises:
            ValueError: the model has features_only and no head.
        """
        if self.config.features_only:
            raise ValueError("a model with features_only has no classifier; build it with features_only=false")
        self.config = replace(self.config, n_classes=n_classes)
        like = next(self.blocks.parameters())
        self.head = nn.Identity()
        if n_classes:
            self.head = nn.Linear(self.num_features, n_classes, device=like.device, dtype=like.dtype)
            initialise(self.head, std=self.config.init_std, n_layers=self.config.n_layers)

    def _ends(self) -> list[int]:
        """How many blocks lie before the end of every stage."""
        stages = self.config.stages
        return [sum(stages[: s + 1]) for s in range(len(stages))]

    def _run(self, images: Tensor, chosen: Sequence[int], until: int) -> tuple[Tensor, dict[int, Tensor]]:
        """The vectors (B, N, D) behind block `until`, and the maps behind so many blocks as `chosen` says."""
        x, grid = self._embedded(images)
        done, maps = 0, {}
        for stage, end in enumerate(self._ends()):
            if done == until:
                break
            if stage:
                x, grid = self.downsamples[stage - 1](x, grid)
            around = Surroundings(grid=None if self.class_token is not None else grid)
            for stop in sorted({min(end, until), *(place for place in chosen if done < place < end)}):
                x, _ = self.blocks(x, around=around, keep=False, part=slice(done, stop))
                done = stop
                if done in chosen:
                    patches = x if self.class_token is None else x[:, 1:]
                    maps[done] = patches.transpose(1, 2).unflatten(2, grid)
        return x, maps

    def _embedded(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Vectors of the patches, (B, N, D), row by row, and rows and columns."""
        shard.refuse("A model of pictures")
        if images.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W); got {tuple(images.shape)}")
        H, W = images.shape[2:]
        if H % self.config.reduction or W % self.config.reduction or not H * W:
            raise ValueError(
                f"rows and columns of a picture must be multiples of {self.config.reduction}, patch_size times 2 for "
                f"every stage after the first; got {H} x {W}, resize or pad it"
            )
        x = self.embedding(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if self.positions is not None:
            x = self.positions(x, grid)
        embedded: Tensor = self.dropout(x)
        return embedded, grid
