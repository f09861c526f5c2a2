"""Compile kernels for GPUs that are not there, and read what the compiler says of registers, spills and shared memory.

`python -m zoo.ops.core.compile_kernels` checks every kernel of every operator for sm_80 and sm_90, and one case of each
for gfx942 (AMD MI300), where nothing was ever tuned: there spills are shown and not bounded. It must run without
TRITON_INTERPRET, since an interpreted kernel cannot be compiled.
"""

import argparse
import functools
import multiprocessing
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import zoo.ops
from zoo import _discover
from zoo.ops.core import dispatch
from zoo.ops.core.kernel_case import KernelCase

if dispatch.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

# Shared memory one block may use, in bytes: CUDA C++ programming guide, table of compute capabilities; MI300's ISA.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


class Report(NamedTuple):
    """What the compiler says of one case on one target; bytes for shared and spills."""

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    problem: str


def compile_case(case: KernelCase, target: str) -> Report:
    """Compile for "sm_80", "sm_90" or "gfx942" and read the resource usage of the machine code."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    if missing:
        raise ValueError(f"{case.kernel.__name__}: neither type nor constant for {', '.join(missing)}")
    amd = target.startswith("gfx")
    constants = dict(case.constants)
    if amd:  # what dispatch.EXACT_PRODUCTS is there
        constants = {k: "ieee" if v == "tf32x3" else v for k, v in constants.items()}
    # pointers of torch tensors are 16-byte aligned, and so the launcher specialises them
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # about a default of AMD's that is to change
        compiled = triton.compile(source, target=gpu, options=options)
    registers, spills = _amd_resources(compiled.asm["amdgcn"]) if amd else _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    problem = ""
    if shared > SHARED_LIMIT[target]:
        problem = f"shared memory {shared} B over the limit of {SHARED_LIMIT[target]} B"
    elif spills > case.spills and not amd:
        problem = f"{spills} B of register spills, {case.spills} B accepted"
    shown = " ".join(f"{k}={v}" for k, v in case.constants.items())
    name = f"{case.kernel.__name__}[{case.label or shown}]"
    return Report(name, target, registers, spills, shared, problem)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (the stack, where spills live), from the binary itself."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread and bytes of scratch memory, from the metadata of the assembly."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers is not None
    assert scratch is not None
    return int(registers[1]), int(scratch[1])


def all_cases(pattern: str = "") -> Iterator[KernelCase]:
    """The compile cases of every operator's `kernels.py` whose kernels match `pattern`."""
    for module in _discover.load_leaves(zoo.ops, "kernels", depth=2):
        for case in module.compile_cases():
            if re.search(pattern, case.kernel.__name__):
                yield case


@functools.cache
def _cases(pattern: str) -> list[KernelCase]:
    return list(all_cases(pattern))


def _compile_numbered(job: tuple[str, int, str]) -> Report:
    """For worker processes: kernels cannot be sent to them, their place in the table can."""
    pattern, number, target = job
    return compile_case(_cases(pattern)[number], target)


def _jobs(pattern: str, targets: Sequence[str], first: bool) -> list[tuple[str, int, str]]:
    seen, jobs = set[str](), []
    for number, case in enumerate(_cases(pattern)):
        again = case.kernel.__name__ in seen
        seen.add(case.kernel.__name__)
        for target in targets:
            once = first or (target.startswith("gfx") and len(targets) > 1)
            if not (again and once):
                jobs.append((pattern, number, target))
    return jobs


def main(argv: list[str] | None = None) -> int:
    """Compile what the arguments name and print a line for each kernel; 1 when any of them is refused or spills."""
    parser = argparse.ArgumentParser(prog="python -m zoo.ops.core.compile_kernels", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression on kernel names")
    parser.add_argument("--targets", nargs="+", choices=SHARED_LIMIT, default=[*SHARED_LIMIT], metavar="TARGET")
    parser.add_argument("--first", action="store_true", help="only the first case of each kernel")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    args = parser.parse_args(argv)
    if dispatch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    red, jobs = 0, _jobs(args.pattern, args.targets, args.first)
    print(f"{'target':>6} {'regs':>5} {'spill B':>8} {'shared B':>9}  kernel")
    with (
        ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) if args.jobs > 1 else nullcontext() as pool
    ):
        for report in map(_compile_numbered, jobs) if pool is None else pool.map(_compile_numbered, jobs):
            red += bool(report.problem)
            mark = f"  RED: {report.problem}" if report.problem else ""
            print(
                f"{report.target:>6} {report.registers:>5} {report.spills:>8} {report.shared:>9}  {report.name}{mark}",
                flush=True,
            )
    print(f"{red} red" if red else "all within limits")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
