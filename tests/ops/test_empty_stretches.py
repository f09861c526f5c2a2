"""A rank that holds no token changes nothing and keeps nobody waiting; the processes are in sharded_empty.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.ops import shard
from zoo.ops.core.table import OPERATORS


@pytest.mark.everything
def test_a_rank_without_tokens_stays_in_the_graph(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_empty.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "errors.json").read_text())
    crossing = {name for name, spec in OPERATORS.items() if spec.cp_kind not in ("local", "attention")}
    assert {name.rsplit(", (")[0] for name in checks} == crossing | {"running_average"}
    wrong = [
        (name, what, error) for name, errors in checks.items() for what, error in errors.items() if not error < 1e-10
    ]
    assert not wrong


def test_tied_outputs_reach_their_inputs_with_zeros() -> None:
    y, x = torch.ones(2, 0, 3, requires_grad=True), torch.full((2,), torch.nan, requires_grad=True)
    frozen = torch.ones(3)
    out = shard.tied(y, x, None, frozen)
    dy, dx = torch.autograd.grad(out.sum(), (y, x))
    assert dy.shape == y.shape
    assert torch.equal(dx, torch.zeros(2))
    assert shard.tied(frozen, x).requires_grad
    assert not shard.tied(frozen, frozen).requires_grad
