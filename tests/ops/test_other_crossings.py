"""Folds over ranks and strips of pictures equal one process; the processes and their checks are in sharded.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.everything
@pytest.mark.parametrize("suite", ["folds", "frontiers"])
def test_a_cut_equals_one_process(tmp_path: Path, suite: str) -> None:
    """Outputs, states and gradients on 1 to 4 ranks; where a message is dropped, the same comparisons must fail."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path), suite],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_ranks = json.loads((tmp_path / "errors.json").read_text())  # {ranks: {check: {what: error}}}
    assert list(by_ranks) == ["1", "2", "3", "4"]
    wrong, unseen = [], []
    for ranks, checks in by_ranks.items():
        assert len(checks) > 15
        for name, errors in checks.items():
            gradient = max((error for what, error in errors.items() if what.startswith("d ")), default=0.0)
            if name.startswith("dropped"):  # a message on the way there: outputs and gradients are off
                failed = min(errors["output"], gradient) > 1e-2
            elif name.startswith("lost"):  # a message on the way back: gradients are off, outputs are right
                failed = errors["output"] < 1e-10 and gradient > 1e-2
            else:
                wrong += [(ranks, name, what, error) for what, error in errors.items() if not error < 1e-10]
                continue
            if ranks != "1" and not failed:
                unseen.append((ranks, name, errors))
    assert not wrong
    assert not unseen
