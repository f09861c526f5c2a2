"""The memory group of a run: knobs that are given, and knobs that the estimate turns until the step fits."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zoo.errors import UserError
from zoo.layers.memory import RECOMPUTE, MemoryPlan
from zoo.layers.offload import HOST_FRACTION, free_host_memory
from zoo.train.memory.estimate import Estimate, estimate, size_text
from zoo.train.memory.offload_fraction import measure, offload_fraction

__all__ = ["ChosenPlan", "MemoryConfig", "choose", "device_budget", "parse_size"]

SPARE = 0.05  # of a device is left free: losses became NaN near the edge (arXiv 2506.13996), and kernels want workspace
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
# Ways to save, in the order of what they cost in time. A tile runs the feed-forward half once more, mixer_saved all but
# the operator, block the operator as well; offloading costs nothing where its copies hide, which no estimate knows.
RECOMPUTE_AUTO = tuple(itertools.product(RECOMPUTE, ("off", "auto")))  # (recompute, tile_mlp)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How activations are kept, see zoo.layers.memory.MemoryPlan; "auto" leaves a knob to the estimate.

    Args:
        recompute: none, block, mixer_saved or auto. None: as the model has it (model.activation_checkpointing).
        offload: none, inputs, alpha:X, alpha:auto (X from a short measurement on the device) or auto.
        tile_mlp: off, auto (tiles of d_model tokens) or a number of tiles.
        budget: what a device may hold, such as 2GiB or 40GB; the device's own memory when omitted. It is what "auto"
            fits a step into; a run that takes more is not stopped.
        estimate: print the estimated memory before the first step, and the measured peak after it.
    """

    recompute: str | None = None
    offload: str = "none"
    tile_mlp: int | str = "off"
    budget: str | int | None = None
    estimate: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None:
            parse_size(str(self.budget))
        if self.recompute not in (*RECOMPUTE, "auto", None):
            raise UserError(f"memory.recompute must be auto or one of {', '.join(RECOMPUTE)}; got {self.recompute!r}")
        if self.recompute is not None:
            self.check(MemoryPlan())

    def check(self, own: MemoryPlan) -> None:
        """Raise UserError where the knobs contradict each other, given the model's own plan."""
        try:
            next(candidates(self, own, torch.device("cpu")))
        except ValueError as error:
            raise UserError(f"memory: {error}") from error

    @property
    def changes(self) -> bool:
        """Anything is asked for that the model would not do by itself."""
        return self != MemoryConfig()


@dataclass(frozen=True)
class ChosenPlan:
    """A plan, what it is estimated to take, and what it was held against."""

    plan: MemoryPlan
    estimate: Estimate | None
    budget: int | None

    def __str__(self) -> str:
        plan = f"memory: recompute={self.plan.recompute} offload={self.plan.offload} tile_mlp={self.plan.tile_mlp}"
        if self.budget is not None:
            plan += f", for a budget of {size_text(self.budget)}"
        if self.estimate is None:
            return plan
        if self.budget is not None and self.estimate.peak > self.budget * (1 - SPARE):
            plan += f"; warning: even this is estimated to take {size_text(self.estimate.peak)}"
        return f"{plan}\n{self.estimate.table()}"


def choose(
    model: Any,
    batch: int,
    length: int,
    config: MemoryConfig,
    *,
    precision: str = "32-true",
    device: torch.device | str = "cpu",
    trial: Callable[[], tuple[float, float]] | None = None,
) -> ChosenPlan:
    """The plan for a step of (batch, length) tokens: the first that fits, in the order of what they cost in time.

    Args:
        model: with a plan of its own, which holds where the config says nothing.
        batch, length: B and T.
        config: given knobs hold; those that are "auto" are turned.
        precision: by Lightning's name.
        device: where it runs; offloading is only tried on devices other than the CPU.
        trial: gives (seconds of a block, bytes a second to the host), for alpha:auto; measured when omitted.

    Returns:
        the plan, and the estimate behind it where one was needed or asked for. When nothing fits: what takes least.
    """
    device = torch.device(device)
    budget = None if config.budget is None else parse_size(str(config.budget))
    auto = config.recompute == "auto" or config.offload == "auto"
    if auto and budget is None:
        budget = device_budget(device)

    def estimated(plan: MemoryPlan) -> Estimate:
        return estimate(model, batch, length, plan, precision=precision, device=device)

    fitting: list[tuple[int, MemoryPlan, Estimate]] = []
    for plan in candidates(config, model.memory, device):
        if config.offload == "alpha:auto":
            plan = _with_alpha(plan, model, batch, length, precision, device, trial)
        if not auto:
            return ChosenPlan(plan, estimated(plan) if config.estimate or budget is not None else None, budget)
        bytes_ = estimated(plan)
        fitting.append((bytes_.peak, plan, bytes_))
        assert budget is not None
        if bytes_.peak <= budget * (1 - SPARE):
            break
    _, plan, bytes_ = min(fitting, key=lambda item: item[0])
    return ChosenPlan(plan, bytes_, budget)


def candidates(config: MemoryConfig, own: MemoryPlan, device: torch.device) -> Iterator[MemoryPlan]:
    """Plans that agree with what is given, the cheapest first."""
    offloads = {"auto": ("none",) if device.type == "cpu" else ("none", "inputs"), "alpha:auto": ("alpha:0",)}
    for offload in offloads.get(config.offload, (config.offload,)):
        tile_mlp: int | str
        for recompute, tile_mlp in RECOMPUTE_AUTO:
            if config.recompute != "auto":
                recompute = own.recompute if config.recompute is None else config.recompute
            if config.recompute != "auto" or config.tile_mlp != "auto":
                tile_mlp = config.tile_mlp
            try:
                plan = MemoryPlan(recompute=recompute, offload=offload, tile_mlp=tile_mlp)
            except ValueError:
                if config.recompute != "auto":
                    raise
                continue  # what an automatic knob must not be beside the given ones
            yield plan


def _with_alpha(
    plan: MemoryPlan, model: Any, batch: int, length: int, precision: str, device: torch.device, trial: Any
) -> MemoryPlan:
    """The fraction that this device can hide, by a measurement of three passes of the first block."""

    def bytes_(plan: MemoryPlan) -> Estimate:
        return estimate(model, batch, length, plan, precision=precision, device=device)

    n = len(model.blocks)
    plain, kept = bytes_(MemoryPlan()), bytes_(replace(plan, offload="none", tile_mlp="off"))
    if trial is None:
        block: nn.Module = model.blocks[0]
        parameter = next(block.parameters())
        x = torch.zeros(batch, length, model.config.d_model, device=parameter.device, dtype=parameter.dtype)
        seconds, bandwidth = measure(block, x)
    else:
        seconds, bandwidth = trial()
    inputs, mixer = kept.inputs / n, kept.mixers / n
    others = max(0.0, (plain.inputs + plain.mixers + plain.feed_forwards) / n - inputs - mixer)
    alpha = offload_fraction(
        bandwidth=bandwidth, seconds=seconds, inputs=inputs, mixer=mixer, others=others,
        host=HOST_FRACTION * free_host_memory(), n_layers=n,
    )  # fmt: skip
    return replace(plan, offload="inputs" if alpha is None else f"alpha:{alpha:.3f}")


def device_budget(device: torch.device) -> int:
    """What a step may use here: all of a GPU that others do not, the free memory of a host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return free_host_memory()


def parse_size(text: str) -> int:
    """Bytes from 2GiB, 500 MiB, 40GB (decimal) or a number."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, flags=re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or float(match[1]) <= 0:
        raise UserError(f"memory.budget must read like 2GiB, 500MiB or 40GB; got {text!r}")
    unit = match[2].lower()
    return int(float(match[1]) * (BINARY[unit] if match[3] else UNITS[unit]))
