"""Plans run by four processes equal one process; the processes and their checks are in executed.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from balancing.execute import IGNORED, micro_batch

from zoo.train.balance import Group, Plan


@pytest.mark.everything
def test_plans_on_four_ranks_equal_one_process(tmp_path: Path) -> None:
    """Loss and gradients, with unequal numbers of steps and rings of any size; and 200 random plans do not hang."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("executed.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "errors.json").read_text())
    assert len(ranks) == 4
    for found in ranks:
        assert len(found["gradients"]) == 12
        assert all(found["properties"].values()), found["properties"]
        assert not {case: error for case, error in found["gradients"].items() if not error < 1e-10}
        assert all(error > 1e-3 for error in found["dropped"].values()), found["dropped"]
        assert found["rings"] == 200
        assert found["refused"] == [True, True]


def test_a_micro_batch_loses_no_target_at_a_cut() -> None:
    plan = Plan((5, 3), 3, ((Group((0, 1, 2), (0, 1)),),), documents=(7, 9))
    tokens = {7: torch.arange(10, 15), 9: torch.arange(20, 23)}
    batches = [micro_batch(plan.for_rank(rank)[0], tokens.__getitem__) for rank in range(3)]
    assert [b["tokens"].tolist() for b in batches] == [[[10, 11]], [[12, 13, 14]], [[20, 21, 22]]]
    assert [b["targets"].tolist() for b in batches] == [[[11, 12]], [[13, 14, IGNORED]], [[21, 22, IGNORED]]]
    assert [b["cu_seqlens"].tolist() for b in batches] == [[0, 2], [0, 3], [0, 0, 3]]
    scored = [int((b["targets"] != IGNORED).sum()) for b in batches]
    assert scored == [plan.for_rank(rank)[0].valid_tokens for rank in range(3)]
    assert sum(scored) == plan.valid_tokens
