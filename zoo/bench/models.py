"""The models' benchmark: training steps by a bare loop and by Lightning as `zoo train` runs it, in turns; decoding."""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from zoo.bench.measure import MEMORY_BY, dtype_of, matmul_peak, synchronize
from zoo.bench.model_inputs import targets
from zoo.bench.record import (
    BARE,
    INTERRUPTED,
    LIGHTNING,
    STEP,
    CaseResult,
    Phase,
    Record,
    SideResult,
    about_this_run,
    load,
    measured,
)
from zoo.bench.report import newest
from zoo.bench.steps import DEPTH, WARM_UP, ModelRequest, StepBench
from zoo.bench.task_losses import says_losses
from zoo.decoding import generate
from zoo.errors import UserError
from zoo.layers.model import as_model
from zoo.ops.core.spec import TOLERANCE
from zoo.train import fit
from zoo.train.run.instantiate import class_of
from zoo.train.tasks.classification import Classification
from zoo.train.tasks.image_classification import ImageClassification
from zoo.train.tasks.language_modelling import LanguageModelling
from zoo.train.tasks.sequence_to_sequence import SequenceToSequence
from zoo.train.tasks.task import LOSS_UNIT

__all__ = ["about_model", "check_request", "measure_decoding", "run_model"]

MEASURED = (LanguageModelling, Classification, ImageClassification, SequenceToSequence)  # by plain cross entropy
DECODE = "one token"
PROMPT, DECODED = 64, 64  # tokens


class InTurns(Callback):
    """Inside Lightning's loop, lets the bare loop run after every burst of steps, and times both."""

    def __init__(self, request: ModelRequest, say: Callable[[str], None]) -> None:
        self.request = request
        self.say = say
        self.side = SideResult(LIGHTNING, "the model")
        self.bench: StepBench | None = None
        self.case: CaseResult | None = None
        self.losses: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A copy of the model, before its first step, is the bare loop's."""
        model: Any = pl_module.model
        name = self.request.config["model"]["name"]
        self.say(f"{name}: checking a step against float64, warming up")
        self.bench = StepBench(self.request, copy.deepcopy(model))
        self.case = self.bench.prepare()
        if self.bench.sides[BARE].red:
            trainer.should_stop = True
        else:
            phase = self.bench.sides[BARE].phases[STEP]
            self.side.phases[STEP] = Phase(tokens=phase.tokens, flops=phase.flops)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warm up, then burst by burst."""
        assert self.bench is not None
        if self.bench.sides[BARE].red:
            return
        synchronize(self.bench.device)
        now = time.perf_counter()
        done = batch_idx + 1 - WARM_UP
        if done <= 0:
            self.losses.append(float(outputs["loss"]) * LOSS_UNIT / self._divisor(pl_module, batch))
        if done > 0 and done % self.request.steps == 0:
            self.side.phases[STEP].times.append((now - self._began) / self.request.steps)
        rounds = len(self.bench.sides[BARE].phases[STEP].times)
        if done >= 0 and done % self.request.steps == 0 and rounds < self.request.repeats:
            assert self.case is not None
            so_far = f"; {newest(self.case)}" if rounds else ""
            self.say(f"{self.case.name}: round {rounds + 1} of {self.request.repeats}{so_far}")
            self.bench.round()
            self._began = time.perf_counter()

    def _divisor(self, task: Any, batch: Any) -> float:
        """What a step's sum of losses is to be divided by."""
        assert self.bench is not None
        if not self.bench.by_task:
            return float((targets(batch) != -100).sum())
        if task.loss_names:  # each is a mean already
            return 1.0
        with torch.no_grad():
            return float(task.batch_loss(batch)[1].clamp(min=1))

    def check(self) -> None:
        """Both loops must have had the same losses: only then they did the same work."""
        assert self.bench is not None
        limit = 10 * DEPTH * TOLERANCE[dtype_of(self.bench.dtype)]  # after updates, which magnify
        for number, (a, b) in enumerate(zip(self.losses, self.bench.losses, strict=True)):
            self.side.errors[f"loss of step {number + 1}"] = abs(a - float(b)) / abs(float(b))
        self.side.red = {name: error for name, error in self.side.errors.items() if not error <= limit}
        if self.side.red:
            self.side.phases = {}


def run_model(request: ModelRequest, say: Callable[[str], None]) -> Record:
    """Measure a model; see the module.

    Ctrl-C ends it early, after the round that runs; the record then holds what was measured and says so.

    Args:
        request: what to measure.
        say: hears what is going on.

    Raises:
        KeyboardInterrupt: stopped before the first round was over.
    """
    config, name = request.config, request.config["model"]["name"]
    check_request(request)
    about = about_this_run(request.device, config["seed"])
    peak = matmul_peak(dtype_of(request.dtype), request.device)
    turns = InTurns(request, say)
    say(f"{name}: {request.repeats} rounds of {request.steps} steps, by a bare loop and by Lightning")
    with tempfile.TemporaryDirectory(prefix="zoo-bench-") as folder, contextlib.redirect_stdout(io.StringIO()):
        code = fit.run(_for_lightning(request), Path(folder) / "run", callbacks=[turns])
    stopped = code == fit.INTERRUPTED
    if stopped and (turns.case is None or not measured([turns.case])):
        raise KeyboardInterrupt
    assert turns.bench is not None
    assert turns.case is not None
    cases = [turns.case]
    if not turns.bench.sides[BARE].is_red:
        turns.check()
        turns.case.sides.insert(1, turns.side)
        if not turns.side.is_red and not stopped and continues_tokens(turns.bench.model):
            say(f"{name}: decoding")
            cases.append(measure_decoding(turns.bench, request.repeats))
    about |= about_model(request) | {
        "matmul_peak": {request.dtype: max(peak, matmul_peak(dtype_of(request.dtype), request.device))},
        "load_after": load(),
    }
    return Record("model", about | ({INTERRUPTED: True} if stopped else {}), cases)


def check_request(request: ModelRequest) -> None:
    """Refuse what a training step of this benchmark is not.

    Raises:
        UserError: another task, several batches per update, or a trial run.
    """
    config = request.config
    kind = class_of("task", config["task"])
    if not (issubclass(kind, MEASURED) or says_losses(kind)):
        names = ", ".join(each.__name__ for each in MEASURED)
        raise UserError(
            f"zoo bench and zoo profile measure steps on batches as the data have them, by cross entropy for {names} "
            f"or by a task's losses_of, and {kind.__name__} (model={config['model']['name']}) has neither; "
            "take another model or task"
        )
    if config["trainer"]["accumulate_grad_batches"] != 1 or config["trainer"]["fast_dev_run"]:
        raise UserError("a training step is measured on one batch; leave accumulate_grad_batches and fast_dev_run out")


def continues_tokens(model: nn.Module) -> bool:
    """Whether greedy decoding can go on from a prompt alone."""
    known = as_model(model)
    return known.causal and [each.name for each in known.inputs if not each.optional] == ["tokens"]


def about_model(request: ModelRequest) -> dict[str, Any]:
    """What a record says of a model's run."""
    return {
        "memory_by": MEMORY_BY[request.device.type],
        "config": {group: request.config[group] for group in ("model", "data", "optim", "trainer")},
        "steps_per_round": request.steps,
    }


def measure_decoding(bench: StepBench, repeats: int) -> CaseResult:
    """Greedy decoding of one sequence from the state, after a prompt."""
    model: Any = bench.model
    prompt = model.example(1, PROMPT)["tokens"][0].tolist()
    sizes = {"B": 1, "prompt": PROMPT, "decoded": DECODED}
    result = CaseResult(bench.request.config["model"]["name"], sizes, bench.dtype)
    side = SideResult("zoo.decoding", "greedy decoding", phases={DECODE: Phase(tokens=1)})
    for number in range(repeats + 1):
        with bench.autocast():
            steps = generate(model, prompt, max_tokens=DECODED, temperature=0.0)
            start = time.perf_counter()
            next(steps)
            first = time.perf_counter()
            n = sum(1 for _ in steps)
        synchronize(bench.device)
        end = time.perf_counter()
        if number == 0:
            side.first_call = first - start
        else:
            side.phases[DECODE].times.append((end - first) / n)
    result.sides.append(side)
    result.notes.append("the first call is the prompt")
    return result


def _for_lightning(request: ModelRequest) -> dict[str, Any]:
    """The run's config, with as many steps as the rounds take and no validation in between."""
    total = request.total_steps
    trainer = {
        **request.config["trainer"],
        "max_steps": total,
        "max_time": None,
        "max_epochs": None,
        "val_every": total + 1,
        "limit_val_batches": 1,
        "checkpoint_every": 0,
        "sample_every": 0,
        "devices": 1,
        "num_nodes": 1,
        "log_every": min(request.config["trainer"]["log_every"], request.steps),  # every burst has a row, at least
    }
    return {**request.config, "trainer": trainer}
