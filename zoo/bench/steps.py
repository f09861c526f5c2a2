"""Whole training steps by a bare loop, and the matrix products of such a step alone."""

import contextlib
import copy
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.bench.flops import training_flops
from zoo.bench.measure import dtype_of, peak_bytes, synchronize
from zoo.bench.model_inputs import arguments, sizes, targets, units
from zoo.bench.record import BARE, STEP, CaseResult, Phase, SideResult
from zoo.bench.task_losses import make_task, own_losses, says_losses
from zoo.ops.core.spec import TOLERANCE, relative_error
from zoo.registry import create_model, resolve
from zoo.train.optim import set_lr
from zoo.train.rng import seed_all

__all__ = ["DEPTH", "WARM_UP", "ModelRequest", "Products", "StepBench"]

LINEAR, PRODUCTS = "linear layers alone", "all products alone"
WARM_UP = 3  # steps
DEPTH = 10  # a model may be wrong by so many times an operator's tolerance: errors add up over its layers
MATMULS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class ModelRequest:
    """What to measure.

    Attributes:
        config: as `zoo.config.compose` gives it.
        steps: training steps of one round and side.
        repeats: rounds.
    """

    config: Mapping[str, Any]
    steps: int = 10
    repeats: int = 10

    @property
    def device(self) -> torch.device:
        """Where `zoo train` would run."""
        accelerator = self.config["trainer"].get("accelerator", "auto")
        on_cuda = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
        return torch.device("cuda", 0) if on_cuda else torch.device("cpu")

    @property
    def precision(self) -> str:
        """As `zoo train` would choose it."""
        chosen: str | None = self.config["trainer"].get("precision")
        if chosen is not None:
            return chosen
        on_cuda = self.device.type == "cuda"
        return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"

    @property
    def total_steps(self) -> int:
        """Of either loop: the schedule ends there."""
        return WARM_UP + self.steps * self.repeats

    @property
    def dtype(self) -> str:
        """What the products are computed in."""
        return "bfloat16" if self.precision.startswith("bf16") else "float32"


class StepBench:
    """Whole training steps by a bare loop, and the matrix products of such a step alone.

    The loop does what the task of `zoo train` does and no more: forward, mean cross entropy or the task's own losses,
    backward, clipping by the global norm, fused AdamW at a scheduled rate, on batches of the same data.
    """

    def __init__(self, request: ModelRequest, model: nn.Module | None = None) -> None:
        self.request, config = request, request.config
        self.device = request.device
        seed_all(config["seed"])
        data = _build_data(config)
        data.prepare_data()
        data.setup("fit")
        self.model = (model or _build_model(config, data)).to(self.device)
        if request.precision == "bf16-true":
            self.model = self.model.to(torch.bfloat16)
        self.model.train()
        self.optim = resolve(config["optim"]["_target_"])(**_settings(config["optim"]))
        self.optimizer: torch.optim.Optimizer = self.optim.build(self.model)
        self.data, self.kind = data, _class_of(config["task"]["_target_"])
        self.by_task = says_losses(self.kind)
        self.task = self._task(self.model)
        self.clip: float | None = config["trainer"].get("gradient_clip_val")
        self.batches: Iterator[dict[str, Tensor]] = _endless(data.train_dataloader())
        self.done = 0
        self.losses: list[Tensor] = []
        self.dtype = request.dtype
        self.sides = {name: SideResult(name, "the model") for name in (BARE, LINEAR, PRODUCTS)}
        self.sizes: dict[str, int] = {}
        self.products: Products | None = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass at the request's precision."""
        mixed = self.request.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext()

    def _task(self, model: nn.Module) -> Any:
        return make_task(self.kind, _settings(self.request.config["task"]), model, self.optim, self.data)

    def loss(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """The loss of a batch; of another model than the bench's where one is given."""
        task = self.task if model is None else self._task(model)
        model = self.model if model is None else model
        with self.autocast():
            outputs = self.outputs(model, task, batch)
        return self.mean(outputs, task, batch)

    def outputs(self, model: nn.Module, task: Any, batch: Mapping[str, Tensor]) -> Any:
        """The forward pass of a model, or of the task that has it."""
        return task(batch) if self.by_task else model(**arguments(model, batch))[0]

    def mean(self, outputs: Any, task: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's own losses where it says them, else the mean cross entropy."""
        return own_losses(task, outputs, batch) if self.by_task else self.loss_of(outputs, targets(batch))

    def units(self, batch: Mapping[str, Tensor]) -> int:
        """How many of the task's units (tokens, images, frames) a batch holds."""
        return units(self.model, batch) if self.task is None else int(self.task.units(batch))

    @property
    def unit(self) -> str:
        """What the throughput counts."""
        return "token" if self.task is None else str(self.task.unit)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the scored targets, in float32 at least."""
        logits = logits.flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100)

    def standing_bytes(self) -> int:
        """What lives between the steps: parameters and the optimiser's moments."""
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in [*self.model.parameters(), *moments])

    def next_batch(self) -> dict[str, Tensor]:
        """From the loader to the device."""
        return {name: x.to(self.device, non_blocking=True) for name, x in next(self.batches).items()}

    def step(self, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """One training step; its loss, still on the device."""
        loss = self.loss(self.next_batch() if batch is None else batch)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        set_lr(self.optimizer, self.optim.lr_at(self.done, min(1.0, self.done / self.request.total_steps)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def prepare(self) -> CaseResult:
        """Prove the step, warm it up, count and weigh it, and note its products."""
        batch = self.next_batch()
        self.sizes = sizes(self.model, batch)
        count, seen = self.units(batch), units(self.model, batch)
        bare = self.sides[BARE]
        bare.errors, by = self._errors(batch)
        limit = DEPTH * TOLERANCE[dtype_of(self.dtype)]
        bare.red = {name: error for name, error in bare.errors.items() if not error <= limit}
        name = self.request.config["model"]["name"]
        case = CaseResult(name, self.sizes, self.dtype, by, "three forward passes", unit=self.unit)
        case.sides = list(self.sides.values())
        if bare.red:
            case.sides = [bare]
            return case
        start = time.perf_counter()
        self.losses.append(self.step(batch))
        synchronize(self.device)
        bare.first_call = time.perf_counter() - start
        self.losses += [self.step() for _ in range(WARM_UP - 1)]
        flops = training_flops(self.model, self.sizes.get("T", 1)) * seen
        weighed = self.next_batch()
        peak = peak_bytes(lambda: self.step(weighed), self.device)
        bare.phases[STEP] = Phase(tokens=count, flops=flops, peak_bytes=peak)
        self.products = Products.of(lambda: self.step(weighed))
        for name in (LINEAR, PRODUCTS):
            self.sides[name].computes = f"{self.products.count(linear=name == LINEAR)} of the step's products"
            self.sides[name].phases[STEP] = Phase(tokens=count, flops=self.products.flops(linear=name == LINEAR))
            self.products.run(linear=name == LINEAR)
        parameters = sum(p.numel() for p in self.model.parameters())
        case.notes += [
            f"{parameters:,} parameters, {flops / count:,.0f} FLOPs per {self.unit} in training",
            f"parameters and the optimiser's moments stand at {self.standing_bytes() / 2**20:.1f} MiB beside the peak",
        ]
        return case

    def _errors(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, float], str]:
        """Loss and gradient of a small part of a batch against the same model in float64."""
        part = self._part(batch)
        model, exact = copy.deepcopy(self.model), copy.deepcopy(self.model).double()
        ours = self.loss(part, model)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        task = self._task(exact) if self.by_task else None
        want = self.mean(self.outputs(exact, task, wide), task, wide)  # outside of autocast
        flat = [
            torch.cat([torch.zeros(1) if g is None else g.double().cpu().flatten() for g in gradients])
            for gradients in (
                torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad], allow_unused=True)
                for loss, m in ((ours, model), (want, exact))
            )
        ]
        errors = {
            "loss": relative_error(ours.detach()[None], want.detach()[None]),
            "gradient": relative_error(flat[0], flat[1]),
        }
        length = sizes(self.model, part).get("T")
        what = f"one {self.unit}" if length is None else f"one row of {length} {self.unit}s"
        return errors, f"the same model in float64 on {what}"

    def _part(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One row of a batch; of a row of tokens the first 256."""
        if self.by_task:
            return {name: x[:1].contiguous() if x.ndim else x for name, x in batch.items()}
        kept = {**arguments(self.model, batch), "targets": targets(batch)}
        kept.pop("cu_seqlens", None)  # the first tokens of a packed row are measured as one document
        part = {name: x[:1, :256].contiguous() if x.ndim == 2 else x[:1].contiguous() for name, x in kept.items()}
        if "source_lengths" in part:
            part["source_lengths"] = part["source_lengths"].clamp(max=256)
        return part

    def round(self) -> None:
        """Time a burst of each side."""
        products = self.products
        assert products is not None, "prepare comes first"
        calls: dict[str, Callable[[], Any]] = {
            BARE: self.step,
            LINEAR: lambda: products.run(linear=True),
            PRODUCTS: lambda: products.run(linear=False),
        }
        for name, call in calls.items():
            self.sides[name].phases[STEP].times.append(wall(call, self.request.steps, self.device))


class Products:
    """The matrix products of a training step, with their shapes, strides and dtypes, to be run alone."""

    def __init__(self, calls: Counter[Any]) -> None:
        self.made: dict[Any, Tensor] = {}
        self.calls = [(name, [self._tensor(key) for key in keys]) for name, *keys in calls.elements()]

    def _tensor(self, key: Any) -> Tensor:
        """One tensor for all products that take one like it."""
        if key not in self.made:
            shape, stride, dtype, device = key
            span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))  # expanded ones overlap
            self.made[key] = torch.randn(span, device=device).to(dtype).as_strided(shape, stride)
        return self.made[key]

    @classmethod
    def of(cls, call: Callable[[], Any]) -> "Products":
        """Those of a call."""
        with _Watch() as watch:
            call()
        return cls(watch.calls)

    def _chosen(self, *, linear: bool) -> list[tuple[str, list[Tensor]]]:
        return [(name, xs) for name, xs in self.calls if not linear or name in ("mm", "addmm")]

    def count(self, *, linear: bool) -> int:
        """How many there are."""
        return len(self._chosen(linear=linear))

    def flops(self, *, linear: bool) -> float:
        """A multiply-add counts two."""
        return float(sum(2 * xs[-2].numel() * xs[-1].shape[-1] for _, xs in self._chosen(linear=linear)))

    @torch.no_grad()
    def run(self, *, linear: bool) -> None:
        """All of them once; products of many dimensions (bmm) belong to the operators' torch forms."""
        for name, xs in self._chosen(linear=linear):
            getattr(torch, name)(*xs)


class _Watch(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # by name: `super().__init__` has no types
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in MATMULS:
            tensors = ((tuple(x.shape), x.stride(), x.dtype, x.device) for x in args if isinstance(x, Tensor))
            self.calls[name, *tensors] += 1
        return func(*args, **(kwargs or {}))


def wall(call: Callable[[], Any], n: int, device: torch.device) -> float:
    """Seconds per call over n calls, waiting for the device at both ends."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / n


# Data and model are built here as a run does, since another commit may do it in other words and other modules.


def _class_of(target: str) -> Any:
    """The class of that name; in a tree from before its module was sorted into a folder, from one folder above."""
    try:
        return resolve(target)
    except ModuleNotFoundError:
        folder, module, name = target.rsplit(".", 2)
        return resolve(f"{folder.rpartition('.')[0]}.{module}.{name}")


def _build_data(config: Mapping[str, Any]) -> Any:
    owner = _class_of(config["data"]["_target_"])
    settings = _settings(config["data"])
    if "seed" in inspect.signature(owner).parameters:
        settings.setdefault("seed", config["seed"])
    return owner(**settings)


def _build_model(config: Mapping[str, Any], data: Any) -> nn.Module:
    fields = {key: value for key, value in config["model"].items() if key not in ("name", "size")}
    for field, value in _class_of(config["task"]["_target_"]).fields(data).items():
        if fields.get(field) is None:
            fields[field] = value
    return create_model(config["model"]["name"], config["model"]["size"], **fields)


def _settings(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "_target_"}


def _endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    """The loader's epochs, one after the other; making an iterator draws nothing from torch's generator."""
    while True:
        rng = torch.get_rng_state()
        iterator = iter(loader)
        torch.set_rng_state(rng)
        yield from iterator
