"""The gate: who is not right in this run has no speed in this run.

Every side's outputs and gradients are held against float64 numbers, on the very inputs that are timed. Those numbers
are the loop's wherever it can be afforded. Elsewhere they are the float64 torch form's, itself held against the loop
on a shorter time with the same sizes; and where even that does not fit, the sides are checked on the short time only.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.bench.flops import forms
from zoo.bench.shapes import Sizes
from zoo.ops.core.spec import (
    TOLERANCE,
    Inputs,
    OperatorSpec,
    convert,
    outputs_and_gradients,
    parity,
    red,
    relative_error,
)

__all__ = ["Exact", "exact_numbers", "loop_bytes", "timed_inputs"]

LOOP_BYTES = 2**30  # a loop may keep this much: two cores then take seconds for it, not minutes
SHORT = 130  # tokens: two chunks of 64 and a ragged rest
TORCH_COPIES = 30  # float64 copies of the inputs that a torch form may need, forward and backward
SHARE = 0.5  # of the free memory
LARGEST = sys.float_info.max  # what infinity and NaN are written as: JSON has no word for them


@dataclass(frozen=True)
class Exact:
    """What the sides must agree with.

    Attributes:
        inputs: float64 values on the CPU, already rounded to the dtype that is measured.
        numbers: float64 outputs and gradients for these inputs.
        by: where the numbers come from.
        wrong: what is wrong with the numbers themselves; nothing passes then.
    """

    inputs: Inputs
    numbers: dict[str, Tensor]
    by: str
    wrong: dict[str, float]

    def errors(self, spec: OperatorSpec, dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, float]:
        """Relative errors of one side."""
        ours = outputs_and_gradients(spec, convert(self.inputs, dtype, device), backend=backend)
        errors = {name: relative_error(ours[name], exact) for name, exact in self.numbers.items()}
        return self.wrong | {name: min(error, LARGEST) for name, error in errors.items()}

    def red(self, errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
        """Those over the harness's tolerance."""
        return self.wrong | red({name: e for name, e in errors.items() if name not in self.wrong}, dtype)


def timed_inputs(spec: OperatorSpec, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """The inputs of a case as they are timed."""
    return convert(_inputs(spec, sizes, seed), dtype, device)


def _inputs(spec: OperatorSpec, sizes: Sizes, seed: int) -> Inputs:
    """Float64 inputs of the operator, without an initial state: what a training step gives it."""
    own = {key: value for key, value in sizes.items() if key not in ("B", "T")}
    return spec.make(sizes["B"], sizes["T"], own, torch.Generator().manual_seed(seed))


def loop_bytes(spec: OperatorSpec, sizes: Sizes) -> int:
    """What the loop keeps, about: a state per step, or all pairs of steps for operators without a state."""
    own = {key: value for key, value in sizes.items() if key not in ("B", "T")}
    if spec.state is None:
        return 8 * sizes["B"] * sizes.get("H", 1) * sizes["T"] ** 2
    numbers: int = sum(x.numel() for x in tree_leaves(spec.state(1, own, torch.Generator())))
    return 8 * sizes["B"] * sizes["T"] * numbers


def exact_numbers(spec: OperatorSpec, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Exact:
    """The float64 numbers for a case, by the best means that can be afforded."""
    inputs = _rounded(_inputs(spec, sizes, seed), dtype)
    if loop_bytes(spec, sizes) <= LOOP_BYTES:
        return Exact(inputs, _numbers(spec, inputs, "reference"), "the float64 loop", {})
    short = {**sizes, "B": 1, "T": min(SHORT, sizes["T"])}
    short_inputs = _rounded(_inputs(spec, short, seed), dtype)
    if "torch" in forms(spec) and _affordable(inputs, device):
        errors = parity(spec, short_inputs, backend="torch", dtype=torch.float64)
        wrong = {f"float64 torch form, {name}": error for name, error in red(errors, torch.float64).items()}
        try:
            numbers = _numbers(spec, inputs, "torch", device)
        except torch.OutOfMemoryError:
            numbers = {}
        if numbers:
            by = f"the float64 torch form, within {TOLERANCE[torch.float64]:.0e} of the loop at T={short['T']}"
            return Exact(inputs, numbers, by, wrong)
    by = f"the float64 loop at B=1, T={short['T']} only, since longer ones do not fit here"
    return Exact(short_inputs, _numbers(spec, short_inputs, "reference"), by, {})


def _rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return convert(convert(inputs, dtype), torch.float64)


def _numbers(
    spec: OperatorSpec, inputs: Inputs, backend: str, device: torch.device = torch.device("cpu")
) -> dict[str, Tensor]:
    return outputs_and_gradients(spec, convert(inputs, torch.float64, device), backend=backend)


def _affordable(inputs: Inputs, device: torch.device) -> bool:
    needed = TORCH_COPIES * sum(x.numel() * x.element_size() for x in inputs.values())
    return needed <= SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a call may take on a device, about."""
    if device.type == "cuda":
        free: Any = torch.cuda.mem_get_info(device)[0]
        return int(free)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 * 2**30  # elsewhere: what any machine of today has
