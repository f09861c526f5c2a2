"""Sequences cut across ranks equal whole ones; the processes and their checks are in sharded.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.ops import shard
from zoo.ops.operators import OPERATORS

Errors = dict[str, dict[str, dict[str, float]]]
RANKS = ("1", "2", "3", "4")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """{ranks: {check: {what: error}}} of one run of all checks."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("ranks", RANKS)
def test_outputs_states_and_gradients_equal_one_process(errors: Errors, ranks: str) -> None:
    found = {name: worst for name, worst in errors[ranks].items() if not name.startswith("dropped")}
    assert len(found) > 40
    assert not {
        name: {k: e for k, e in worst.items() if not e < 1e-10}
        for name, worst in found.items()
        if not max(worst.values()) < 1e-10
    }


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_dropped_state_is_seen(errors: Errors, ranks: str) -> None:
    """The negative control: without the exchange the same comparisons fail, so that they prove something."""
    found = {name: worst for name, worst in errors[ranks].items() if name.startswith("dropped")}
    assert len(found) == 7
    for name, worst in found.items():
        assert next(iter(worst.values())) > 1e-2, name  # outputs
        gradients = [error for what, error in worst.items() if what.startswith("d ")]
        assert max(gradients) > 1e-2, name


@given(st.integers(1, 6), st.lists(st.integers(0, 20), max_size=6), st.integers(1, 20))
def test_local_boundaries_name_every_token_once(size: int, cuts: list[int], length: int) -> None:
    cuts = [0, *sorted(min(c, length) for c in cuts), length]
    owner = [max(i for i, c in enumerate(cuts[:-1]) if c <= t) for t in range(length)]  # the document of each token
    seen, edge = [], 0
    for rank in range(size):
        left, right = shard.stretch(length, rank, size)
        assert left == edge
        edge = right
        local = shard.local_boundaries(torch.tensor(cuts), rank, size, length)
        bounds = local.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == right - left
        assert bounds == sorted(bounds)
        assert len(local.documents) == len(bounds) - 1
        for i, document in enumerate(local.documents):
            seen += [document] * (bounds[i + 1] - bounds[i])
        if left < right:
            assert local.continues == (left > 0 and owner[left] == owner[left - 1])
            assert (len(bounds) > 2 and bounds[1] == 0) == (left > 0 and not local.continues)
    assert edge == length
    assert seen == owner


def test_boundaries_must_span_the_stream() -> None:
    with pytest.raises(ValueError, match=r"must start at 0 and end at the length 9; got 0 and 8"):
        shard.local_boundaries(torch.tensor([0, 8]), 0, 2, 9)


def test_a_shard_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"needs a process group; call torch.distributed.init_process_group"):
        shard.SequenceShard()


def test_no_shard_is_the_default() -> None:
    assert shard.current() is None
    with shard.use(None):
        assert shard.current() is None


@pytest.mark.parametrize("name", [name for name, spec in OPERATORS.items() if spec.summary is not None])
def test_asking_for_a_shard_breaks_no_graph(name: str) -> None:
    inputs = OPERATORS[name].inputs(1, 9)

    def run() -> tuple[torch.Tensor, ...]:
        return OPERATORS[name].function(**inputs)

    for ours, eager in zip(torch.compile(run, fullgraph=True, backend="eager")(), run(), strict=True):
        assert torch.equal(ours, eager)
