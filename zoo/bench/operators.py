"""The operators' benchmark: every side proved, warmed up and weighed, then timed in turns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.bench.flops import attention_flops, operator_flops
from zoo.bench.gate import Exact, exact_numbers, timed_inputs
from zoo.bench.implementations import Side, choose_sides
from zoo.bench.measure import Clock, dtype_of, matmul_peak, peak_bytes
from zoo.bench.record import CaseResult, Phase, SideResult
from zoo.bench.shapes import Case, Request, Sizes
from zoo.errors import UsageError
from zoo.ops.core.spec import Inputs
from zoo.ops.core.table import OPERATORS

__all__ = ["OperatorBench", "device_of", "operator_sizes"]

FORWARD, TRAIN = "forward", "forward+backward"
LONG = 1.0  # seconds: a call of this length needs no second one to be warm
FEW = 3  # rounds that every side takes part in
BUDGET = 15.0  # seconds after which a slow side sits out the other rounds


def operator_sizes() -> dict[str, Sizes]:
    """The operators there are, with example sizes."""
    return {name: spec.sizes[0] for name, spec in OPERATORS.items()}


def device_of(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        n = torch.cuda.device_count()
        raise UsageError(f"device {name} is not on this machine; there is cpu{f' and {n} CUDA device(s)' if n else ''}")
    return device


class _Runner:
    """One side at one shape: its inputs on the device, and the two calls that are timed."""

    def __init__(self, side: Side, case: Case, inputs: Inputs) -> None:
        self.side, self.case = side, case
        self.result = SideResult(side.name, side.spec.name)
        self.inputs = inputs
        self.leaves = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
        self.floating = [x for x in self.leaves.values() if x.requires_grad]
        self.cotangent: Tensor | None = None
        self.calls: dict[str, int] = {}
        self.spent: dict[str, float] = {}

    def forward(self) -> tuple[Tensor, ...]:
        """As in inference."""
        with torch.no_grad():
            return self.side.spec.run(self.inputs, backend=self.side.backend)

    def train(self) -> tuple[Any, ...]:
        """Forward and backward from a fixed gradient of the output; the final state is not used, as in training."""
        output = self.side.spec.run(self.leaves, backend=self.side.backend)[0]
        if self.cotangent is None:
            generator = torch.Generator().manual_seed(1)
            self.cotangent = torch.randn(output.shape, generator=generator).to(output)
        return output, torch.autograd.grad(output, self.floating, self.cotangent, allow_unused=True)

    def phases(self) -> dict[str, Any]:
        """What is timed."""
        return {FORWARD: self.forward, TRAIN: self.train}


class OperatorBench:
    """Cases and sides of one request; `prepare` once, `round` many times, then `results`.

    Rounds go over all cases and sides, so that what disturbs the machine disturbs them alike.

    Args:
        request: what to measure.
        say: hears what is being prepared.
    """

    def __init__(self, request: Request, say: Callable[[str], None] = lambda text: None) -> None:
        missing = sorted({case.operator for case in request.cases} - OPERATORS.keys())
        if missing:
            raise UsageError(f"there is no operator {missing[0]!r} here; there is {', '.join(OPERATORS)}")
        self.request = request
        self.say = say
        self.device = device_of(request.device)
        self.clock = Clock(self.device)
        self.peaks: dict[str, float] = {}
        self.cases: list[tuple[CaseResult, list[_Runner]]] = []

    def prepare(self, case: Case) -> CaseResult:
        """Prove the sides of a case, warm them up, count and weigh; a side that is red is not run further."""
        spec, dtype = OPERATORS[case.operator], dtype_of(case.dtype)
        sides, notes = choose_sides(spec, case, self.device, self.request.backends)
        result = CaseResult(case.operator, dict(case.sizes), case.dtype, notes=notes)
        make = partial(timed_inputs, sizes=case.sizes, dtype=dtype, device=self.device, seed=self.request.seed)
        inputs = make(spec)
        forward, total, result.flops_by = operator_flops(spec, inputs)
        right = []
        for group in ([side for side in sides if side.name != "sdpa"], [side for side in sides if side.name == "sdpa"]):
            if not group:
                continue
            self.say(f"{case.label}: computing in float64")
            own = group[0].name == "sdpa"  # another function: other inputs, other numbers, another count
            exact = exact_numbers(group[0].spec if own else spec, case.sizes, dtype, self.device, self.request.seed)
            result.proved_by = result.proved_by or exact.by
            counts = attention_flops(case.sizes) if own else (forward, total)
            for side in group:
                runner = _Runner(side, case, make(side.spec) if own else inputs)
                result.sides.append(runner.result)
                self.say(f"{case.label}: checking {side.name} against float64")
                if self._prove(runner, exact, dtype):
                    right.append((runner, counts))
            del exact  # as large as the inputs and gradients in float64: the memory belongs to what is measured
        runners = [runner for runner, counts in right if self._warm_up(runner, counts)]
        self.cases.append((result, runners))
        if case.dtype not in self.peaks:
            self.peaks[case.dtype] = matmul_peak(dtype, self.device)
        return result

    def _prove(self, runner: _Runner, exact: Exact, dtype: torch.dtype) -> bool:
        result = runner.result
        try:
            first_call = self.clock.first(runner.train)  # before the proof, which would have compiled everything
            result.errors = exact.errors(runner.side.spec, dtype, self.device, runner.side.backend)
        except Exception as failure:  # whatever a side dies of is a finding about it, and the others come next
            result.failure = _first_line(failure)
            return False
        result.red = exact.red(result.errors, dtype)
        result.first_call = None if result.red else first_call
        return not result.red

    def _warm_up(self, runner: _Runner, flops: tuple[int, int]) -> bool:
        sizes = runner.case.sizes
        self.say(f"{runner.case.label}: warming up {runner.side.name}")
        try:
            for (name, call), count in zip(runner.phases().items(), flops, strict=True):
                if self.device.type == "cuda" or (runner.result.first_call or 0.0) < LONG:
                    call()
                runner.calls[name] = self.clock.calls_per_sample(call)
                tokens = sizes["B"] * sizes["T"]
                peak = peak_bytes(call, self.device)
                runner.result.phases[name] = Phase(tokens=tokens, flops=float(count), peak_bytes=peak)
        except torch.OutOfMemoryError as failure:
            runner.result.failure = _first_line(failure)
            return False
        return True

    def round(self) -> None:
        """Time every side of every case once, those that were slow only in the first rounds."""
        for _, runners in self.cases:
            for runner in runners:
                for name, call in runner.phases().items():
                    times = runner.result.phases[name].times
                    if len(times) >= FEW and runner.spent.get(name, 0.0) > BUDGET:
                        continue
                    times.append(self.clock.seconds(call, runner.calls[name]))
                    runner.spent[name] = runner.spent.get(name, 0.0) + times[-1] * runner.calls[name]

    def results(self) -> list[CaseResult]:
        """What was found; measures the matrix products once more, in case others were busy at the start."""
        for name in self.peaks:
            self.peaks[name] = max(self.peaks[name], matmul_peak(dtype_of(name), self.device))
        return [result for result, _ in self.cases]

    def forget(self) -> None:
        """Let the cases' memory go."""
        self.cases = []


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"
