"""`zoo doctor`: what is installed, which devices there are, and whether the operators are right on them."""

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

import zoo
from zoo.errors import UsageError
from zoo.ops.convolutions.causal_conv1d import external
from zoo.ops.core import dispatch
from zoo.ops.core.call import Choice, Operator, watched
from zoo.ops.core.spec import OperatorSpec, convert, parity
from zoo.ops.core.table import OPERATORS

PACKAGES = (
    "torch", "triton", "lightning", "hydra-core", "torchmetrics", "safetensors", "sentencepiece", "tokenizers",
    "datasets", "numpy", "huggingface_hub", "rich", "matplotlib", "causal-conv1d",
)  # fmt: skip
LENGTH = 70  # crosses a chunk of 64
INTERPRETED = (
    "TRITON_INTERPRET=1: kernels run in Triton's interpreter on the CPU. It is slow, so each is checked at its first "
    "sizes only; and it has no bfloat16, so that kernels in bfloat16 are not checked here. Unset it for a usual report."
)


def doctor_command(device: str | None) -> int:
    """Print the report; 1 when an operator is wrong on a device."""
    places = devices() if device is None else [_device(device)]
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    out.print(f"zoo {zoo.__version__}, Python {platform.python_version()}, {platform.platform()}")
    out.print(_versions(), soft_wrap=True)
    out.print(external.status(), soft_wrap=True, markup=False)
    for place in devices():
        out.print(f"device {place}: {_describe(place)}")
    if dispatch.INTERPRETED:
        out.print(INTERPRETED, soft_wrap=True, markup=False)
    return 0 if _report(out, places) else 1


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def check(spec: OperatorSpec, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[str, float, str | None]:
    """Compare one form of an operator with the float64 loop, values and gradients.

    Returns:
        the worst quantity, its relative error, and what is wrong, or None.
    """
    worst, error = "", 0.0
    interpreted = backend == "triton" and device.type == "cpu"
    for sizes in spec.sizes[:1] if interpreted else spec.sizes:
        inputs = spec.inputs(2, LENGTH, sizes)
        try:
            errors = parity(spec, inputs, backend=backend, dtype=dtype, device=device)
        except Exception as failure:  # any failure of a kernel is a finding, and the other operators come next
            first = next(iter(str(failure).splitlines()), "")
            return "", float("inf"), f"{type(failure).__name__}: {first}"
        name = max(errors, key=errors.__getitem__)
        if errors[name] >= error:
            worst, error = name, errors[name]
        if wrong := spec.red(errors, dtype):
            return worst, error, f"over the tolerance with {dict(sizes)}: {', '.join(wrong)}"
    return worst, error, None


def cases(device: torch.device) -> list[tuple[str, torch.dtype]]:
    """The forms and dtypes to check on a device."""
    if device.type == "cuda":
        forms = ["triton", "torch"] if dispatch.HAS_TRITON else ["torch"]
        return [(form, dtype) for form in forms for dtype in (torch.float32, torch.bfloat16)]
    forms = ["torch", "triton"] if dispatch.INTERPRETED else ["torch"]
    return [(form, dtype) for form in forms for dtype in (torch.float64, torch.float32)]


def form_cases(spec: OperatorSpec, device: torch.device) -> list[tuple[str, torch.dtype]]:
    """Those that the operator has; where "auto" hands CUDA tensors to an optional package, that too.

    Most kernels refuse float64, as their operators say.
    """
    checks = [
        (form, dtype)
        for form, dtype in cases(device)
        if form in spec.forms and (spec.operator.float64 or (form, dtype) != ("triton", torch.float64))
    ]
    if device.type == "cuda" and spec.library():
        checks += [("auto", torch.float32), ("auto", torch.bfloat16)]
    return checks


def default(spec: OperatorSpec, device: torch.device) -> Choice:
    """What "auto" runs for float32 inputs on a device, and why, as the operator itself says in a call."""
    choices: list[Choice] = []

    def watch(operator: Operator, choice: Choice, outermost: bool) -> None:
        choices.append(choice)

    with watched(watch), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `check` collects them
        try:
            spec.run(convert(spec.inputs(2, LENGTH), torch.float32, device))
        except Exception as failure:  # a kernel that fails; `check` says how
            return choices[0] if choices else Choice("nothing", type(failure).__name__)
    return choices[0]


def _report(out: Console, places: list[torch.device]) -> bool:
    table = Table(
        "operator",
        "device",
        "runs by default",
        "because of",
        "checked",
        "dtype",
        "worst error",
        "",
        box=None,
        pad_edge=False,
    )
    fine, findings = True, []
    for spec in OPERATORS.values():
        for place in places:
            runs, why = default(spec, place)
            for backend, dtype in form_cases(spec, place):
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    worst, error, wrong = check(spec, backend, dtype, place)
                findings += [f"{spec.name}: {w.message}" for w in said]
                mark = "[green]ok[/green]" if wrong is None else f"[red]WRONG[/red] {wrong}"
                short = str(dtype).removeprefix("torch.")
                table.add_row(spec.name, str(place), runs, why, backend, short, f"{error:.1e} {worst}", mark)
                fine = fine and wrong is None
    out.print(table)
    for line in dict.fromkeys(findings):
        out.print(f"warning: {line}", markup=False)
    n_devices = f"{len(places)} device{'s' if len(places) > 1 else ''}"
    verdict = "agree with their definitions" if fine else "do NOT all agree with their definitions"
    out.print(f"{len(OPERATORS)} operators {verdict} on {n_devices}, outputs and gradients")
    return fine


def _versions() -> str:
    packages = []
    for package in PACKAGES:
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"{package} -")
    return ", ".join(packages)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device not in devices():
        raise UsageError(f"--device {name} is not on this machine; there is {', '.join(map(str, devices()))}")
    return device
