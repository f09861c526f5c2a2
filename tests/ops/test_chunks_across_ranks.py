"""Chunks of attention may be cut by the edges of ranks anywhere; the processes are in sharded.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.everything
def test_chunks_that_ranks_cut_are_whole_chunks(tmp_path: Path) -> None:
    """Outputs, gradients and three steps of training; without messages the same comparisons fail."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path), "chunks"],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "errors.json").read_text())  # {ranks: {check: {what: error}}}
    assert list(ranks) == ["1", "2", "3", "4"]
    for size, checks in ranks.items():
        assert len(checks) == 19
        for name, errors in checks.items():
            if not name.startswith("dropped"):
                assert max(errors.values()) < 1e-10, (size, name, errors)
            elif size != "1":
                assert errors["output"] > 1e-2, (size, name)
                assert max(error for what, error in errors.items() if what.startswith("d ")) > 1e-2, (size, name)
