"""Where a training step's time and memory go, by operator."""

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from zoo import ops
from zoo.bench.report import align, mebibytes, seconds
from zoo.bench.steps import ModelRequest, StepBench
from zoo.errors import UserError
from zoo.train.optim import set_lr

__all__ = ["Profile", "named_operators", "percentages", "profile_model"]

OPERATOR, PHASE = "zoo.ops/", "zoo.step/"  # ranges in the trace
FUNCTION = 0  # the scope of what is not the autograd engine's own
ENGINE = "autograd::engine::evaluate_function: "
WARM_UP = 2  # steps
NAMES = {  # the outermost torch operation decides; what is not here is elementwise work and the like
    "matmul": {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "dot", "mv"},
    "copies": {"copy_", "clone", "contiguous", "to", "_to_copy", "cat", "stack", "flip", "repeat", "index_select"},
    "other": {
        "view", "t", "transpose", "permute", "as_strided", "unflatten", "flatten", "reshape", "chunk", "split", "slice",
        "select", "expand", "unsqueeze", "squeeze", "detach", "empty", "unbind", "narrow", "alias", "embedding", "item",
    },
}  # fmt: skip
ELEMENTWISE = "norms, convolutions, elementwise"


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds a step, and bytes live when most memory was."""

    group: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Profile:
    """What was found.

    Attributes:
        rows: by group, the largest first; forward and backward apart.
        seconds: of one step: the sum over the rows.
        peak_bytes: the most memory that was live above what stands between the steps.
        standing_bytes: parameters and the optimiser's moments.
        clock: whose seconds: "CPU", or the GPU's kernels.
        units: how many of `unit` (tokens, images, frames) a step takes.
    """

    name: str
    rows: tuple[Row, ...]
    seconds: float
    peak_bytes: int
    standing_bytes: int
    clock: str
    units: int = 0
    unit: str = "token"

    def markdown(self) -> str:
        """The table; both columns of percentages sum to 100."""
        times = percentages([row.seconds for row in self.rows])
        weights = percentages([float(row.bytes) for row in self.rows])
        table = [["where", "time", "share", "memory at the peak", "share"], ["---", "---:", "---:", "---:", "---:"]]
        for row, time, weight in zip(self.rows, times, weights, strict=True):
            table.append([row.group, seconds(row.seconds), f"{time:.1f}%", mebibytes(row.bytes), f"{weight:.1f}%"])
        table.append(["sum", seconds(self.seconds), "100.0%", mebibytes(self.peak_bytes), "100.0%"])
        lines = [
            *align(table),
            "",
            f"{self.name}: one training step{self._rate()}, time by the {self.clock} clock while the profiler runs (so "
            f"small operations look a little dearer than they are); parameters and moments stand at "
            f"{mebibytes(self.standing_bytes)} beside the peak",
        ]
        return "\n".join(lines) + "\n"

    def _rate(self) -> str:
        if not (self.units and self.seconds):
            return ""
        return f" of {self.units:,} {self.unit}s, {self.units / self.seconds:.4g} {self.unit}s/s"


class _RangedSteps(StepBench):
    """The bare loop with its parts named in the trace."""

    def step(self, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        with record_function(f"{PHASE}data"):
            batch = self.next_batch() if batch is None else batch
        with record_function(f"{PHASE}forward"), self.autocast():
            outputs = self.outputs(self.model, self.task, batch)
        with record_function(f"{PHASE}loss"):
            loss = self.mean(outputs, self.task, batch)
            del outputs
        with record_function(f"{PHASE}backward"):
            loss.backward()
        with record_function(f"{PHASE}optimizer"):
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            set_lr(self.optimizer, self.optim.lr_at(self.done, 0.0))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()


def profile_model(request: ModelRequest, trace: Path) -> Profile:
    """Profile `request.steps` training steps after a warm-up and write a trace for chrome://tracing.

    Raises:
        UserError: the trace could not be written, or the loss is not finite: numbers that are none have no profile.
    """
    bench = _RangedSteps(request)
    on_cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with named_operators():
        for _ in range(WARM_UP):
            bench.step()
        with profile(activities=activities, profile_memory=True) as seen:
            for _ in range(request.steps):
                with record_function(f"{PHASE}whole"):
                    loss = bench.step()
            if on_cuda:
                torch.cuda.synchronize(bench.device)
    if not bool(torch.isfinite(loss)):
        raise UserError(
            f"a profile needs a finite loss, and after {bench.done} steps it is {float(loss)}; lower optim.lr"
        )
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(trace))
    except OSError as error:
        raise UserError(f"{trace} could not be written ({error.strerror or error}); give another run_dir=") from error
    times = {group: t / request.steps for group, t in times_by_group(seen, on_cuda=on_cuda).items()}
    weights, peak = memory_by_group(seen, bench.device.type)
    rows = [Row(group, times.get(group, 0.0), weights.get(group, 0)) for group in {**times, **weights}]
    rows.sort(key=lambda row: (-row.seconds, -row.bytes))
    return Profile(
        name=request.config["model"]["name"],
        rows=tuple(rows),
        seconds=sum(times.values()),
        peak_bytes=peak,
        standing_bytes=bench.standing_bytes(),
        clock="GPU kernels'" if on_cuda else "CPU",
        units=bench.units(bench.next_batch()),
        unit=bench.unit,
    )


@contextlib.contextmanager
def named_operators() -> Iterator[None]:
    """Inside, every call of a public operator from a layer or model is a range of the trace."""
    names: list[str] = vars(ops)["__all__"]  # the stub of zoo.ops has no list
    public = {id(getattr(ops, name)): name for name in names if callable(getattr(ops, name))}
    places = [
        (module, attribute, value)
        for name, module in sorted(sys.modules.items())
        if name.startswith(("zoo.layers", "zoo.models"))
        for attribute, value in list(vars(module).items())
        if id(value) in public
    ]
    for module, attribute, value in places:
        setattr(module, attribute, _ranged(value, public[id(value)]))
    try:
        yield
    finally:
        for module, attribute, value in places:
            setattr(module, attribute, value)


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(OPERATOR + name):
            return function(*args, **kwargs)

    return run


def times_by_group(seen: profile, *, on_cuda: bool) -> dict[str, float]:
    """Seconds of each group, over all profiled steps; the sum is the time of the steps (on CUDA: of their kernels)."""
    events = [
        _event(e, e.name, e.cpu_parent, e.sequence_nr, e.scope == FUNCTION, e.time_range.start)
        for e in seen.events() or []
        if e.device_type == DeviceType.CPU
    ]
    groups = _Groups(events)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if on_cuda or any(e.name == f"{PHASE}whole" for e in groups.chain(event)):
            own = event.event.self_device_time_total if on_cuda else event.event.self_cpu_time_total
            if own > 0:
                seconds[groups.of(event)] += own / 1e6
    return dict(seconds)


def memory_by_group(seen: profile, device: str) -> tuple[dict[str, int], int]:
    """Who had allocated what was live at the moment of most live memory, and how much that was."""
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    events = []
    for node in _walk(results.experimental_event_tree()):
        operation = _kind(node.tag) == "TorchOp"
        number = node.extra_fields.sequence_number if operation else -1
        forward = operation and _kind(node.extra_fields.scope) == "FUNCTION"
        events.append(_event(node, node.name, node.parent, number, forward, node.start_time_ns))
    groups = _Groups(events)
    changes = [
        e for e in events if _kind(e.event.tag) == "Allocation" and device in str(e.event.extra_fields.device).lower()
    ]
    live: dict[int, tuple[str, int]] = {}
    total = peak = 0
    best: dict[str, int] = {}
    sizes: dict[str, int] = defaultdict(int)
    for event in sorted(changes, key=lambda e: e.start):
        place, size = event.event.extra_fields.ptr, event.event.extra_fields.alloc_size
        if size > 0:
            group = groups.of(event)
            live[place] = (group, size)
            sizes[group] += size
            total += size
            if total > peak:
                peak, best = total, dict(sizes)
        elif place in live:  # what was live before the profile is nobody's
            group, size = live.pop(place)
            sizes[group] -= size
            total -= size
    return {group: n for group, n in best.items() if n}, peak


def _walk(nodes: Sequence[Any]) -> Iterator[Any]:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        stack += node.children


def _kind(value: Any) -> str:
    """The last word of an enumeration's value."""
    return str(value).rpartition(".")[2]


@dataclass(frozen=True)
class _Event:
    """One event of either of the profiler's two views; `number` is that of the autograd node that it may have made."""

    event: Any
    name: str
    parent: Any
    number: int
    start: float
    undoes: int = -1  # the number of the node that the autograd engine is running


def _event(event: Any, name: str, parent: Any, number: int, forward: bool, start: float) -> _Event:
    undoes = name.startswith(ENGINE)
    return _Event(event, name, parent, number if forward and not undoes else -1, start, number if undoes else -1)


class _Groups:
    """Sorts events into groups. An event of the backward pass belongs to what made its node in the forward pass."""

    def __init__(self, events: Sequence[_Event]) -> None:
        self.known = {id(e.event): e for e in events}
        self.makers: dict[int, _Event] = {}
        for event in events:  # of those that carry a node's number, the last that began has made it
            if event.number >= 0 and event.start >= getattr(self.makers.get(event.number), "start", -1.0):
                self.makers[event.number] = event

    def chain(self, event: _Event) -> list[_Event]:
        """From the outermost event to this one."""
        chain = [event]
        while chain[-1].parent is not None:
            chain.append(self.known[id(chain[-1].parent)])
        return chain[::-1]

    def of(self, event: _Event) -> str:
        """The group of an event."""
        chain = self.chain(event)
        engine = next((e for e in chain if e.name.startswith(ENGINE)), None)
        if engine is None:
            group, way = self._forward([e.name for e in chain]), "forward"
        elif engine.undoes in self.makers:
            group, way = self._forward([e.name for e in self.chain(self.makers[engine.undoes])]), "backward"
        else:  # AccumulateGrad keeps or adds a gradient
            group, way = "copies", ""
        return group if group in ("optimizer", "copies", "other") else f"{group}, {way}"

    def _forward(self, names: Sequence[str]) -> str:
        for name in names:
            if name.startswith(OPERATOR):
                return name.removeprefix(OPERATOR)
        for part in ("optimizer", "loss"):
            if f"{PHASE}{part}" in names:
                return part
        outermost = next((name for name in names if "::" in name and not name.startswith(ENGINE)), "")
        space, _, short = outermost.partition("::")
        for group, known in NAMES.items():
            if space == "aten" and short in known:
                return group
        return ELEMENTWISE if space == "aten" else "other"


def percentages(values: Sequence[float]) -> list[float]:
    """Shares with one decimal that sum to exactly 100: the largest remainders are rounded up."""
    total = sum(values)
    if not total:
        return [0.0 for _ in values]
    exact = [1000 * value / total for value in values]
    floors = [int(x) for x in exact]
    short = 1000 - sum(floors)
    up = sorted(range(len(values)), key=lambda i: exact[i] - floors[i], reverse=True)[:short]
    return [(n + (i in up)) / 10 for i, n in enumerate(floors)]
