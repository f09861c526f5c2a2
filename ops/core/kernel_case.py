"""One specialisation of a kernel, as it is compiled to prove that it fits a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a kernel, as a published model launches it.

    Args:
        kernel: the triton.jit function.
        signature: types of the run-time arguments, "*bf16", "i32", "fp32".
        constants: the constexpr arguments.
        num_warps, num_stages: as in the launch.
        spills: bytes of register spills that are accepted; more than 0 needs a reason beside the case.
        label: what the case stands for, shown in the table.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    spills: int = 0
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
