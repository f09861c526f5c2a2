"""Block diffusion: blocks of tokens come one after the other, and the tokens of a block are denoised together."""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.layers import Attention, SequenceModel
from zoo.layers.block_diffusion import block_size_of, mask_token_of
from zoo.ops import Visible, shard
from zoo.ranges import Range
from zoo.train.metrics import IGNORED, BitsPerByte
from zoo.train.optim import Limits, Recipe
from zoo.train.tasks.draws import draws
from zoo.train.tasks.refusals import refuse_classes
from zoo.train.tasks.task import Batch, Task

__all__ = ["BlockDiffusion", "Grid"]

Noise = Literal["subset", "block", "document"]


class Grid(NamedTuple):
    """Where the tokens of a row stand: which block, which place in it, which position of its document.

    slot: (S,) block * block_size + place; blocks of different documents differ.
    position: (S,) from 0 in each document.
    document: (S,) counts the documents of the row.
    n_blocks: of all documents of the row.
    """

    slot: Tensor
    position: Tensor
    document: Tensor
    n_blocks: int

    @classmethod
    def of(cls, bounds: list[int], block_size: int, device: torch.device) -> "Grid":
        """The grid of documents with these boundaries."""
        cuts = torch.tensor(bounds, device=device)
        sizes = cuts.diff()
        document = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        position = torch.arange(bounds[-1], device=device) - cuts[document]
        blocks = (sizes + block_size - 1) // block_size
        first = blocks.cumsum(0) - blocks
        return cls(first[document] * block_size + position, position, document, int(blocks.sum()))


class BlockDiffusion(Task):
    """The bound of block diffusion on the cross entropy of a text, in nats per token.

    A row is laid out as [noisy | clean]. A noisy token sees its own block and the clean blocks before it, so that one
    forward gives the losses of all blocks. What a token stands for is predicted at its own position. The first token
    of a document is given. Every other one is scored, as in next-token prediction, so that bits per byte compare.

    Validation always estimates the bound of mask rates uniform in (0, 1], by `noise="subset"`. With blocks of one token
    that is the cross entropy of the next token. What is hidden is a pure function of the seed, the batch's number and
    the rank of the data.

    Args:
        model: a SequenceModel of attention that sees the whole past.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: text.
        block_size: tokens of a block; None takes the model's own, or 4 where it has none.
        mask_id: the token that hides another, which no text may have; None takes the model's own, or the last of its
            vocabulary where it has none. Byte 255 is in no UTF-8 text.
        noise: "subset" hides n of the m tokens of a block, n uniform in 1 ... m, and weighs them by m / n. "block"
            draws a mask rate t for each block, stratified over the batch, and hides each token with probability t.
            "document" draws t once for all blocks of a document.
        lowest, highest: bounds of t, uniform between them; not for "subset".
        weight: of a hidden token, "inverse" is 1 / t and "one" is 1; not for "subset".
        denominator: the loss is a mean over the "scored" tokens, hidden or not, or over the "masked" ones alone.
        seed: of what is hidden.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model has mixers that cannot see by blocks, or its vocabulary has no room for the mask.

    Source: SDAR, arXiv 2510.06303 ("document", 1 / t); BD3-LM, arXiv 2503.09573 ("block", bounds 0.45 and 0.95 for
    blocks of 4). Both codes normalise by "scored". "subset" is the same bound with t integrated out, so that no
    weight exceeds the block's size.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: Any,
        *,
        block_size: Annotated[int | None, Range(1)] = None,
        mask_id: Annotated[int | None, Range(0)] = None,
        noise: Noise = "subset",
        lowest: Annotated[float, Range(above=0, most=1)] = 1e-3,
        highest: Annotated[float, Range(above=0, most=1)] = 1.0,
        weight: Literal["inverse", "one"] = "inverse",
        denominator: Literal["scored", "masked"] = "scored",
        seed: int = 0,
        max_nonfinite_steps: int = 10,
    ) -> None:
        refuse_unless_visible(model)
        if not 0 < lowest <= highest <= 1:
            raise UserError(f"task.lowest and task.highest must be 0 < lowest <= highest <= 1; got {lowest}, {highest}")
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)
        assert isinstance(model, SequenceModel)  # refused above otherwise
        config = model.config
        self.block_size = block_size_of(config) if block_size is None else block_size
        own = mask_token_of(config)
        self.mask_id = own if mask_id is None else mask_id
        if (mask_id is None and own < data.vocab_size) or self.mask_id >= config.vocab_size:
            raise UserError(
                f"task=block_diffusion hides tokens behind a symbol that no text has, and {self.mask_id} is none of "
                f"the model's {config.vocab_size} or one of the data's {data.vocab_size}; set model.vocab_size="
                f"{data.vocab_size + 1}, or task.mask_id to an id that this text never has, such as 255 for bytes"
            )
        self.noise, self.rates, self.weight, self.denominator = noise, (lowest, highest), weight, denominator
        self.seed = seed
        self.metrics = ("bits_per_byte",)
        self.val_metrics["bits_per_byte"] = BitsPerByte()

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The vocabulary, with room for the mask symbol."""
        refuse_classes("block_diffusion", data)
        if "bits_per_byte" not in data.metrics:
            raise UserError(
                f"task=block_diffusion denoises text, and {type(data).__name__} is none; use data=pydocs, text_files "
                "or hub"
            )
        return {"vocab_size": data.vocab_size + 1}

    # -- the noise ----------------------------------------------------------------------------------------------------

    def prepared(self, batch: Batch, index: int, *, training: bool) -> Batch:
        """[noisy | clean] tokens (B, 2 S), the weights (B, S) of the hidden ones, and the parts of a Visible.

        "tokens", "clean" (B, S), "weights" (B, S) where 0 is not hidden, "scored" (B, S), "positions" (1, 2 S),
        "label", "first", "end". S has one token more than the batch for each document: the first token is context.
        """
        if shard.current() is not None:
            raise UserError(
                "task=block_diffusion needs both streams of a block on one rank; use strategy=ddp, or leave it out"
            )
        clean, scored, bounds = whole_text(batch)
        grid = Grid.of(bounds, self.block_size, clean.device)
        sampler = self.trainer.distributed_sampler_kwargs
        draw = draws(self.seed, index, sampler, clean.device, training=training)
        weights = self._weights(scored, grid, draw, self.noise if training else "subset")
        noisy = torch.where(weights > 0, self.mask_id, clean)
        seen = Visible.block_diffusion(len(grid.slot), self.block_size, cu_seqlens=bounds, device=clean.device)
        there = (scored | (grid.position == 0)).repeat(1, 2)  # what fills up a row is seen by nobody
        label, first, end = (x.expand(there.shape) for x in (seen.label, seen.first, seen.end))
        return {
            "tokens": torch.cat([noisy, clean], dim=1), "clean": clean, "weights": weights, "scored": scored,
            "positions": grid.position.repeat(2)[None], "label": label, "first": first,
            "end": torch.where(there, end, first), "n_bytes": batch["n_bytes"],
        }  # fmt: skip

    def _weights(self, scored: Tensor, grid: Grid, draw: torch.Generator, noise: Noise) -> Tensor:
        """(B, S) float32: what a hidden token's cross entropy counts, 0 where it is not hidden."""
        if noise == "subset":
            return subset_weights(scored, grid, self.block_size, draw)
        rows, tokens = scored.shape
        groups = grid.n_blocks if noise == "block" else int(grid.document.max()) + 1
        group = grid.slot // self.block_size if noise == "block" else grid.document
        u = stratified(rows * groups, draw, scored.device).view(rows, groups)
        low, high = self.rates
        rate = (low + (high - low) * u)[:, group]
        chance = torch.rand(rows, tokens, generator=draw, device=scored.device, dtype=torch.float32)
        weight = 1 / rate if self.weight == "inverse" else torch.ones_like(rate)
        return torch.where(scored & (chance < rate), weight, 0.0)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def noisy_hidden(self, batch: Batch) -> Tensor:
        """The normalised hidden vectors (B, S, D) of the noisy stream of a prepared batch."""
        assert isinstance(self.model, SequenceModel)
        visible = Visible(batch["label"], batch["first"], batch["end"])
        x = self.model.hidden(batch["tokens"], positions=batch["positions"], visible=visible)
        return x[:, : batch["clean"].shape[1]]

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted cross entropy of the hidden tokens, summed, and the number of tokens it is a mean over."""
        hidden = batch["weights"] > 0
        x, targets, weights = (z[hidden][None] for z in (self.noisy_hidden(batch), batch["clean"], batch["weights"]))
        head_loss: Any = self.model.head_loss
        nll: Tensor = head_loss(x, targets, ignore_index=IGNORED, reduction="none")
        return (nll * weights).sum(), (batch["scored"] if self.denominator == "scored" else hidden).sum()

    def units(self, batch: Batch) -> int:
        """Tokens of the text; the noisy copies do not count."""
        return batch["clean"].numel() if "clean" in batch else batch["tokens"].numel()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the bound, as nats per scored token and bits per byte."""
        batch = self.prepared(batch, batch_idx, training=False)
        nll, _ = self.batch_loss(batch)
        self.val_loss.update(nll.float(), batch["scored"].sum())
        bits: Any = self.val_metrics["bits_per_byte"]
        bits.update(nll.float(), batch["n_bytes"])


def refuse_unless_visible(model: nn.Module) -> None:
    """Refuse a model that cannot be trained by blocks.

    Raises:
        UserError: it is no SequenceModel, or a mixer of it runs in one direction or sees a window.
    """
    name = getattr(model, "name", "this model")
    if not isinstance(model, SequenceModel):
        raise UserError(f"task=block_diffusion trains a causal model of text, and {name} is none; use its own task")
    for mixer in model.blocks.mixers():
        kind = type(mixer).__name__
        windowed = isinstance(mixer, Attention) and mixer.window is not None
        if "visible" not in mixer.takes or windowed:
            what = f"{kind} with a window" if windowed else kind
            raise UserError(
                f"task=block_diffusion lets the tokens of a block see each other, and {what} of {name} cannot; use "
                "attention that sees the whole past in every layer, as model=sdar or transformer"
            )


def whole_text(batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs and targets as one text.

    Returns:
        tokens (B, S), in each document its first input and all its targets; which of them are targets (B, S); and the
        boundaries of documents in a row.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    rows, length = tokens.shape
    cuts = [0, length] if "cu_seqlens" not in batch else batch["cu_seqlens"].tolist()
    bounds = [cut + i for i, cut in enumerate(cuts)]
    firsts = torch.tensor(bounds[:-1], device=tokens.device)
    later = torch.ones(bounds[-1], dtype=torch.bool, device=tokens.device)
    later[firsts] = False
    clean, scored = tokens.new_zeros(rows, bounds[-1]), later.new_zeros(rows, bounds[-1])
    clean[:, firsts] = tokens[:, torch.tensor(cuts[:-1], device=tokens.device)]
    there = targets != IGNORED
    clean[:, later] = torch.where(there, targets, 0)
    scored[:, later] = there
    return clean, scored, bounds


def subset_weights(scored: Tensor, grid: Grid, block_size: int, draw: torch.Generator) -> Tensor:
    """Hide n of the m scored tokens of each block, n uniform in 1 ... m, and weigh each by m / n.

    The expected sum is the bound of t uniform in (0, 1), because the integral of t^(n-1) (1-t)^(m-n) over t, times m
    choose n, is 1 / n.
    """
    rows, device = len(scored), scored.device
    shape = (rows, grid.n_blocks, block_size)
    order = torch.full((rows, grid.n_blocks * block_size), torch.inf, device=device)
    keys = torch.rand(scored.shape, generator=draw, device=device, dtype=torch.float32)
    order[:, grid.slot] = torch.where(scored, keys, torch.inf)
    m = (order < torch.inf).view(shape).sum(-1)
    u = stratified(rows * grid.n_blocks, draw, device).view(rows, grid.n_blocks)
    n = torch.minimum((u * m).long() + 1, m)
    rank = order.view(shape).argsort(-1).argsort(-1)
    weight = torch.where(rank < n[..., None], (m / n.clamp(min=1))[..., None], 0.0)
    return weight.flatten(1)[:, grid.slot]


def stratified(n: int, draw: torch.Generator, device: torch.device) -> Tensor:
    """n numbers of [0, 1), one in each of n equal parts, in random order: each alone is uniform."""
    u = torch.rand(n, generator=draw, device=device, dtype=torch.float32)
    return ((torch.randperm(n, generator=draw, device=device) + u) / n).clamp(max=1 - 2**-24)
