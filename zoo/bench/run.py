"""Whole runs of the benchmark, from a request to a record."""

import dataclasses
import gc
from collections.abc import Callable, Sequence

import torch

from zoo.bench.compare_commits import compare, repository
from zoo.bench.measure import MEMORY_BY
from zoo.bench.models import about_model, check_request
from zoo.bench.operators import OperatorBench, device_of
from zoo.bench.record import INTERRUPTED, CaseResult, Record, about_this_run, load, measured
from zoo.bench.report import newest
from zoo.bench.shapes import Case, Request
from zoo.bench.steps import ModelRequest
from zoo.ops.core import dispatch

__all__ = ["compare_models", "compare_operators", "run_operators"]


def run_operators(request: Request, say: Callable[[str], None]) -> Record:
    """Measure all cases. On a CPU the rounds of one operator go over all its shapes, so that growth can be read off;
    on a GPU, where large shapes fill the memory, it is shape by shape.

    Ctrl-C ends it early; the record then holds what was measured and says so.

    Args:
        request: what to measure.
        say: hears what is going on.

    Raises:
        KeyboardInterrupt: stopped before anything was measured.
    """
    bench = OperatorBench(request, say)
    about = about_this_run(bench.device, request.seed)
    groups: dict[str, list[Case]] = {}
    for case in request.cases:
        groups.setdefault(case.operator if bench.device.type == "cpu" else case.label, []).append(case)
    cases: list[CaseResult] = []
    try:
        for group in groups.values():
            _measure(bench, group, say)
            cases += bench.results()
            bench.forget()
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        cases = measured([*cases, *(result for result, _ in bench.cases if result not in cases)])
        if not cases:
            raise
        about[INTERRUPTED] = True
    about |= {"matmul_peak": bench.peaks, "memory_by": MEMORY_BY[bench.device.type], "load_after": load()}
    return Record("operators", about, cases)


def _measure(bench: OperatorBench, group: Sequence[Case], say: Callable[[str], None]) -> None:
    """Prove and time cases that take turns; says the newest times with each round."""
    for case in group:
        bench.prepare(case)
    so_far = ""
    for number in range(bench.request.repeats):
        say(f"{group[0].operator}: round {number + 1} of {bench.request.repeats}{so_far}")
        bench.round()
        so_far = f"; {group[-1].label}, {newest(bench.cases[-1][0])}"


def compare_operators(request: Request, revision: str, say: Callable[[str], None]) -> Record:
    """The same in another commit, side by side: zoo's default form unless others were asked for by name."""
    device = device_of(request.device)
    default = "triton" if device.type == "cuda" and dispatch.HAS_TRITON else "torch"
    asked = dataclasses.replace(request, backends=request.backends or (default,))
    about = about_this_run(device, request.seed)
    message = {"do": "operators", "request": dataclasses.asdict(asked)}
    cases, commit, stopped = compare(message, request.repeats, revision, repository(), say)
    about |= {"base": commit, "memory_by": MEMORY_BY[device.type], "load_after": load()}
    return Record("operators", about | ({INTERRUPTED: True} if stopped else {}), cases)


def compare_models(request: ModelRequest, revision: str, say: Callable[[str], None]) -> Record:
    """A model's training step by a bare loop, in another commit and here."""
    check_request(request)
    about = about_this_run(request.device, request.config["seed"])
    message = {"do": "model", "request": dataclasses.asdict(request)}
    cases, commit, stopped = compare(message, request.repeats, revision, repository(), say)
    about |= about_model(request) | {"base": commit, "load_after": load()}
    return Record("model", about | ({INTERRUPTED: True} if stopped else {}), cases)
