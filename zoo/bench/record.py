"""Results as JSON: what was measured, on what, with which code; and back."""

import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.errors import UserError
from zoo.files import write_atomically

__all__ = [
    "BARE", "INTERRUPTED", "LIGHTNING", "STEP", "CaseResult", "Phase", "Record", "SideResult", "about_this_run",
    "case_from", "commit", "git", "load", "measured", "read", "write",
]  # fmt: skip

FORMAT, VERSION = "zoo-bench", 1
BARE, LIGHTNING, STEP = "bare loop", "lightning", "training step"  # names that the report knows
INTERRUPTED = "interrupted"  # the key of `Record.about` that says so


@dataclass
class Phase:
    """One thing that was timed: forward, forward+backward, step, decode.

    Attributes:
        times: seconds per call, one per round; sides with fewer rounds sat out the last ones.
        tokens: per call, or what else the case counts by its `unit`.
        flops: per call, by a formula; 0 when nobody has counted them.
        peak_bytes: memory above what was live before the call, or None.
    """

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    flops: float = 0.0
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """The median of `times`, in seconds per call."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: a quarter of the rounds was faster than the first, a quarter slower than the second."""
        if len(self.times) < 2:
            return self.times[0], self.times[0]
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high


@dataclass
class SideResult:
    """One competitor.

    Attributes:
        name: torch, triton, reference, fla, sdpa; or whose code it is.
        computes: the operator, or another function that it stands beside for comparison.
        errors: relative error of every output and gradient against float64.
        red: the errors over the tolerance; not empty means that no speed was measured.
        failure: why it could not run at all.
        first_call: seconds of the first forward and backward in this process, compilation included.
    """

    name: str
    computes: str
    errors: dict[str, float] = field(default_factory=dict)
    red: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    first_call: float | None = None
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def is_red(self) -> bool:
        """Whether its numbers are wrong, or it does not run."""
        return bool(self.red) or self.failure is not None


@dataclass
class CaseResult:
    """One shape.

    Attributes:
        name: the operator or the model.
        sizes: of the inputs.
        proved_by: what the float64 numbers of the parity check were.
        flops_by: who counted.
        sides: the competitors; the first is what the others are compared with.
        notes: what a reader should know.
        unit: what `Phase.tokens` counts.
    """

    name: str
    sizes: dict[str, int]
    dtype: str
    proved_by: str = ""
    flops_by: str = ""
    sides: list[SideResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unit: str = "token"


@dataclass
class Record:
    """A whole run of `zoo bench`."""

    kind: str
    about: dict[str, Any]
    cases: list[CaseResult]

    @property
    def is_red(self) -> bool:
        """Whether any side's numbers are wrong."""
        return any(side.is_red for case in self.cases for side in case.sides)

    @property
    def is_interrupted(self) -> bool:
        """Whether it was stopped before everything was measured."""
        return bool(self.about.get(INTERRUPTED))


def about_this_run(device: torch.device, seed: int, **more: Any) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    return {
        "command": command_line(),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "load": load(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
        "commit": commit(Path(zoo.__file__).resolve().parent.parent),
        **more,
    }


def measured(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """The cases with at least one time, or with a side that is wrong: what an interrupted run can show."""
    return [
        case for case in cases
        if any(side.is_red or any(phase.times for phase in side.phases.values()) for side in case.sides)
    ]  # fmt: skip


def load() -> list[float] | None:
    """The load of the machine, others' included, over 1, 5 and 15 minutes; None where the system does not say."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str | None]:
    """What the numbers depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "zoo": zoo.__version__}
    versions["cuda"] = torch.version.cuda
    for name in ("torch", "triton", "flash-linear-attention", "lightning"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_model() -> str:
    """The processor's name as Linux tells it, else as Python's `platform` does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(root: Path, *words: str) -> str | None:
    """What git says in a folder; None when it fails or there is none."""
    # A hook's environment names another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(root: Path) -> dict[str, Any] | None:
    """The commit of the checkout in `root` and whether files differ from it; None when zoo was installed."""
    if not (root / ".git").exists():
        return None
    revision = git(root, "rev-parse", "HEAD")
    return None if revision is None else {"revision": revision, "dirty": bool(git(root, "status", "--porcelain"))}


def command_line() -> str:
    """What the user typed, as far as it can be known."""
    program, *arguments = sys.argv
    return shlex.join([Path(program).name or program, *arguments])


def write(record: Record, path: Path) -> None:
    """Write a record; the file is there in full or not at all."""
    data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(record)}
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}); give another out=") from error


def read(path: Path) -> Record:
    """A record that `write` wrote.

    Raises:
        UserError: the file is not there or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); zoo bench out=FILE writes one") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); zoo bench out=FILE writes what report= reads") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} holds no results of zoo bench; zoo bench out=FILE writes them")
    if data.get("version") != VERSION:
        raise UserError(
            f"{path} has version {data.get('version')} of the format and this zoo reads {VERSION}; measure again"
        )
    try:
        return Record(kind=data["kind"], about=data["about"], cases=[case_from(case) for case in data["cases"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); measure again with zoo bench out=FILE") from error


def case_from(data: Mapping[str, Any]) -> CaseResult:
    """A case from plain values."""
    sides: Sequence[Mapping[str, Any]] = data["sides"]
    return CaseResult(**{**data, "sides": [side_from(side) for side in sides]})


def side_from(data: Mapping[str, Any]) -> SideResult:
    """A side from plain values."""
    return SideResult(**{**data, "phases": {name: Phase(**phase) for name, phase in data["phases"].items()}})
