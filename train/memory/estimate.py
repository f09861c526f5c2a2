"""The memory of a training step, from a run of its blocks on the meta device: shapes and lifetimes without numbers.

Block by block: what the forward pass leaves behind, and the most that is live while a block runs forward or backward,
recomputation included. Blocks that read the same are run once. Long sequences are not run: every part is affine in T
once chunks and stretches are full, so that two lengths tell all.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.layers import Surroundings
from zoo.layers.backbone import SequenceModel
from zoo.layers.encoder import Encoder
from zoo.layers.memory import MemoryPlan
from zoo.layers.offload import offload
from zoo.layers.stack import Stack
from zoo.layers.vision import VisionModel
from zoo.ops.token_wise.linear_cross_entropy.chunked import chunk_tokens
from zoo.train.memory.live_bytes import LiveBytes, flash_on_meta

__all__ = ["PRECISIONS", "Estimate", "Precision", "estimate", "size_text"]

# Longer sequences are told by two lengths, three and four of the stretches of 2**18 numbers that torch forms work on:
# DeltaNet's backward holds 41, 32, 29.2, 29.15, 29.15 times its input for 1, 2, 3, 4, 6 stretches. The bounds are for
# time: Mamba's loop takes 2 ms a token here.
SHORTEST, LONGEST = 1024, 6144
STRETCHES = 3 * 2**18


class Precision(NamedTuple):
    """What numbers are kept in, by Lightning's names."""

    activations: torch.dtype
    weight: int  # bytes a parameter, of all its copies
    gradient: int
    optimizer: int  # of Adam's two moments


PRECISIONS = {
    "32-true": Precision(torch.float32, 4, 4, 8),
    "64-true": Precision(torch.float64, 8, 8, 16),
    "bf16-true": Precision(torch.bfloat16, 2, 2, 4),
    "bf16-mixed": Precision(torch.bfloat16, 6, 4, 8),  # float32, and the copy that products read
}


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step.

    weights, gradients, optimizer: of all parameters.
    inputs, mixers, feed_forwards: kept by all blocks between forward and backward: their inputs, what the half over
        time keeps besides, what the half over channels keeps.
    loss: the head, at its most.
    work: live beyond what is kept, where the peak is: one block's recomputation and backward, or the loss.
    peak: the most that is live at once.
    host: what waits on the host.
    """

    weights: int
    gradients: int
    optimizer: int
    inputs: int
    mixers: int
    feed_forwards: int
    loss: int
    work: int
    peak: int
    host: int

    def table(self) -> str:
        """One line an item."""
        names = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "block inputs": self.inputs,
            "mixers keep": self.mixers,
            "feed-forwards keep": self.feed_forwards,
            "loss": self.loss,
            "work at the peak": self.work,
            "peak": self.peak,
            "on the host": self.host,
        }
        return "\n".join(f"  {name:19}{size_text(size):>11}" for name, size in names.items())


class _Block(NamedTuple):
    """A block's bytes."""

    inputs: float
    mixer: float
    feed_forward: float
    forward: float  # the most that is live in its forward pass, its input included
    backward: float  # in its backward pass, what it kept included
    host: float

    @property
    def kept(self) -> float:
        return self.inputs + self.mixer + self.feed_forward


def estimate(
    model: nn.Module,
    batch: int,
    length: int,
    plan: MemoryPlan | None = None,
    *,
    precision: str = "32-true",
    device: torch.device | str = "cpu",
) -> Estimate:
    """The memory of a training step with Adam.

    Args:
        model: one of zoo's, on any device; only its shapes are read. Build it under `torch.device("meta")` to have
            none of it in memory.
        batch, length: B and T of the tokens of one step on this device.
        plan: the model's own when omitted.
        precision: "32-true", "64-true", "bf16-true" or "bf16-mixed".
        device: where it will run: a CUDA device runs kernels, which keep less than the torch forms.

    Returns:
        the bytes; what kernels and libraries take inside is not counted, nor the allocator's fragmentation.

    Raises:
        ValueError: an unknown precision, or a model whose blocks are not all of one width and one input: it must be a
            SequenceModel, an Encoder, or a VisionModel of one stage.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    several = isinstance(model, VisionModel) and len(model.config.stages) > 1
    if not isinstance(model, SequenceModel | Encoder | VisionModel) or several:
        raise ValueError(
            "memory is estimated for a SequenceModel, an Encoder or a VisionModel of one stage; got "
            f"{type(model).__name__}, say memory.recompute=block (or none) in place of auto, and no estimate"
        )
    how, device = PRECISIONS[precision], torch.device(device)
    chosen: MemoryPlan = model.memory if plan is None else plan
    shapes = _shapes(model, how.activations, device)
    short = max(SHORTEST, min(LONGEST, STRETCHES // (batch * model.config.d_model)))
    has_grid = isinstance(model, VisionModel) and model.class_token is None
    kinds: dict[str, _Block] = {}
    blocks: list[_Block] = []
    grads: list[int] = []
    for block in shapes.blocks:
        kind = repr(block)
        if kind not in kinds:
            kinds[kind] = _Block(*_along(partial(_run_block, block, chosen, batch, how, has_grid), length, short))
        blocks.append(kinds[kind])
        grads.append(how.gradient * sum(p.numel() for p in block.parameters()))
    loss = _along(lambda T: (_run_loss(shapes, batch, T, how, device),), length, short)[0]

    parameters = sum(p.numel() for p in model.parameters())
    head = how.gradient * (parameters - sum(grads) // how.gradient)
    static = parameters * (how.weight + how.optimizer)
    kept = [0.0, *accumulate(block.kept for block in blocks)]  # before each block
    later = [*reversed([0, *accumulate(reversed(grads))])][1:]  # gradients of the blocks after each
    phases = [
        *((kept[i] + block.forward, kept[i]) for i, block in enumerate(blocks)),
        (kept[-1] + loss, kept[-1]),
        *(
            (kept[i] + block.backward + head + later[i], kept[i + 1] + head + later[i])
            for i, block in enumerate(blocks)
        ),
        (head + sum(grads), head + sum(grads)),
    ]
    peak, held = max(phases)
    return Estimate(
        weights=parameters * how.weight,
        gradients=parameters * how.gradient,
        optimizer=parameters * how.optimizer,
        inputs=round(sum(block.inputs for block in blocks)),
        mixers=round(sum(block.mixer for block in blocks)),
        feed_forwards=round(sum(block.feed_forward for block in blocks)),
        loss=round(loss),
        work=round(peak - held),
        peak=round(static + peak),
        host=round(sum(block.host for block in blocks)),
    )


def _shapes(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """The model on the meta device, with the operators that will run."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    shapes: Any = copy.deepcopy(model, memo).to(device="meta", dtype=dtype)
    if device.type == "cuda":
        for module in shapes.modules():
            if getattr(module, "backend", None) == "auto":
                module.backend = "triton"
    return shapes


def _along(run: Callable[[int], tuple[float, ...]], length: int, short: int) -> tuple[float, ...]:
    """A run's numbers at this length, from two shorter ones where it is long."""
    long = short * 4 // 3
    if length <= long:
        return run(length)
    steps = (length - long) / (long - short)
    return tuple(b + max(0.0, b - a) * steps for a, b in zip(run(short), run(long), strict=True))


def _run_block(
    block: Any, plan: MemoryPlan, batch: int, how: Precision, has_grid: bool, length: int
) -> tuple[float, ...]:
    """The fields of _Block at one length; mixers of pictures see one column of patches."""
    around = Surroundings(grid=(length, 1) if has_grid else None)
    width = block.mixer_norm.weight.numel()
    engine = offload(torch.device("meta"))

    def run(half: Callable[[Tensor], Tensor]) -> tuple[int, int, int, int]:
        """(kept, forward, backward, host)"""
        leaf = torch.empty(batch, length, width, dtype=how.activations, device="meta", requires_grad=True)
        parameters = [p for p in block.parameters() if p.requires_grad]
        sent = engine.packed
        with flash_on_meta(), LiveBytes() as bytes_:
            x = leaf * 1.0  # no leaf, which its graph would hold
            y = half(x)
            del x
            if engine.packed > sent:
                engine.pack(torch.empty(0, device="meta"))  # the next block's, so that this one's leaves
            forward, kept = bytes_.peak, bytes_.live - _size(y)
            dy = torch.empty_like(y)
            bytes_.reset()
            gradients = torch.autograd.grad(y, [leaf, *parameters], dy, allow_unused=True)
            backward = bytes_.peak - _size(y)
        del gradients
        return kept, forward, backward, engine.packed - sent

    block.memory = plan
    kept, forward, backward, host = run(lambda x: block(x, around=around)[0])
    inputs = min(kept, batch * length * width * how.activations.itemsize)
    fed = 0
    if block.feed_forward is not None and plan.recompute == "none":
        fed = run(lambda x: plan._tiled(block, x))[0]
    return inputs, kept - inputs - fed, fed, forward, backward, host


def _run_loss(model: Any, batch: int, length: int, how: Precision, device: torch.device) -> float:
    """The most that is live from the last block's output to its gradient, the output included."""
    ends = copy.copy(model)
    ends._modules = dict(model._modules, blocks=Stack())
    made = {
        name: x.to(how.activations) if x.is_floating_point() else x
        for name, x in model.example(batch, length, device="meta").items()
    }
    fused = isinstance(model, SequenceModel) or (isinstance(model, Encoder) and model.lm_head is not None)
    with LiveBytes() as bytes_:
        if fused:
            hidden = ends.hidden(**made) if isinstance(model, SequenceModel) else ends.encode(**made)[0]
            loss = ends.head_loss(hidden, made["tokens"], reduction="sum")
            del hidden
        else:
            loss = ends(**made)[0].sum()
        gradients = torch.autograd.grad(loss, list(ends.parameters()), allow_unused=True)
    del gradients
    if not fused:
        return bytes_.peak
    vocabulary: int = model.config.vocab_size
    wide = torch.promote_types(how.activations, torch.float32)
    work = wide if device.type == "cpu" else how.activations
    here, there = (chunk_tokens(batch * length, vocabulary, work, torch.device(d)) for d in (device, "meta"))
    return bytes_.peak + (here - there) * vocabulary * work.itemsize


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def size_text(size: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
