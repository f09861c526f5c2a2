"""Kernels compile for GPUs that are not there: one case each here, all by `python -m zoo.ops.core.compile_kernels`."""

import os
import subprocess
import sys

import pytest

from zoo.ops.core import dispatch

pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.everything
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_fits(target: str) -> None:
    done = run("-m", "zoo.ops.core.compile_kernels", "--first", "--targets", target)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for kernel in (
        "causal_conv1d_fwd_kernel", "delta_rule", "gla_", "attention_", " affine_", "block_affine_", "selective_",
        "ssd_",
        "vandermonde_", "complex_affine_", "rnn_fwd_kernel", "rnn_bwd_kernel",
    ):  # fmt: skip
        assert kernel in done.stdout


def test_a_kernel_that_spills_more_than_accepted_is_red() -> None:
    code = (
        "import dataclasses; from zoo.ops.core.compile_kernels import all_cases, compile_case; "
        "case = next(all_cases('causal_conv1d_fwd')); "
        "report = compile_case(dataclasses.replace(case, spills=-1), 'sm_90'); "
        "assert 'spills' in report.problem and report.registers > 0, report"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_interpreted_kernel_is_refused() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "zoo.ops.core.compile_kernels"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
