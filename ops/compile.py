"""Compile kernels for GPUs that are not there, and read what the compiler says of registers, spills and shared memory.

`python -m zoo.ops.compile` checks every kernel of every operator for sm_80 and sm_90; it must run without
TRITON_INTERPRET, since an interpreted kernel cannot be compiled.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zoo.ops
from zoo.ops import dispatch
from zoo.ops.kernel_case import KernelCase

if dispatch.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

# Shared memory one block may use, in bytes: CUDA C++ programming guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


class Report(NamedTuple):
    """What the compiler says of one case on one target; bytes for shared and spills."""

    name: str
    target: int
    registers: int
    spills: int
    shared: int
    problem: str


def compile_case(case: KernelCase, target: int) -> Report:
    """Compile for compute capability `target` (80 or 90) and read the resource usage of the machine code."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    if missing:
        raise ValueError(f"{case.kernel.__name__}: neither type nor constant for {', '.join(missing)}")
    # pointers of torch tensors are 16-byte aligned, and so the launcher specialises them
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, dict(case.constants), aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    problem = ""
    if shared > SHARED_LIMIT[target]:
        problem = f"shared memory {shared} B over the limit of {SHARED_LIMIT[target]} B"
    elif spills > case.spills:
        problem = f"{spills} B of register spills, {case.spills} B accepted"
    constants = " ".join(f"{k}={v}" for k, v in case.constants.items())
    name = f"{case.kernel.__name__}[{case.label or constants}]"
    return Report(name, target, registers, spills, shared, problem)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (the stack, where spills live), from the binary itself."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def all_cases(pattern: str = "") -> Iterator[KernelCase]:
    """The compile cases of every `zoo.ops.*.kernels` module whose kernels match `pattern`."""
    for info in pkgutil.iter_modules(zoo.ops.__path__, "zoo.ops."):
        if info.ispkg and importlib.util.find_spec(f"{info.name}.kernels"):
            for case in importlib.import_module(f"{info.name}.kernels").compile_cases():
                if re.search(pattern, case.kernel.__name__):
                    yield case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.ops.compile", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression on kernel names")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    parser.add_argument("--first", action="store_true", help="only the first case of each kernel")
    args = parser.parse_args(argv)
    if dispatch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    red, seen = 0, set[str]()
    print(f"{'sm':>3} {'regs':>5} {'spill B':>8} {'shared B':>9}  kernel")
    for case in all_cases(args.pattern):
        if args.first and case.kernel.__name__ in seen:
            continue
        seen.add(case.kernel.__name__)
        for target in args.targets:
            report = compile_case(case, target)
            red += bool(report.problem)
            mark = f"  RED: {report.problem}" if report.problem else ""
            print(
                f"{target:>3} {report.registers:>5} {report.spills:>8} {report.shared:>9}  {report.name}{mark}",
                flush=True,
            )
    print(f"{red} red" if red else "all within limits")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
