"""Memories that learn at test time, cut across ranks, equal one process; the processes are in sharded.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.everything
def test_a_memory_cut_across_ranks_equals_one_process(tmp_path: Path) -> None:
    """Outputs, states and gradients on 1 to 4 ranks; where messages are dropped, the same comparisons must fail."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path), "memories"],
        capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "errors.json").read_text())  # {ranks: {check: {what: error}}}
    assert list(ranks) == ["1", "2", "3", "4"]
    for size, checks in ranks.items():
        assert len(checks) == 81
        for name, errors in checks.items():
            gradient = max((error for what, error in errors.items() if what.startswith("d ")), default=0.0)
            if not name.startswith("dropped"):
                assert max(errors.values()) < 1e-10, (size, name, errors)
            elif size != "1":
                assert min(errors["output"], gradient) > 1e-2, (size, name)
