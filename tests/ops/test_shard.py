"""Sequences cut across ranks equal whole ones; the processes and their checks are in sharded.py."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from zoo.ops import shard
from zoo.ops.core.spec import OperatorSpec, relative_error
from zoo.ops.core.table import OPERATORS


def beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch.compile looks functions' modules up by name
    spec.loader.exec_module(module)
    return module


sharded_latency = beside("sharded_latency")
SUMMED = [pytest.param(spec, id=name) for name, spec in OPERATORS.items() if spec.summary is not None]


@pytest.mark.parametrize(
    ("suite", "part"),
    [
        pytest.param("operators", ", batch", id="operators-batch"),
        *(
            pytest.param(suite, "", id=suite, marks=pytest.mark.everything)
            for suite in ("operators", "attention", "models", "between pairs")
        ),
    ],
)
def test_a_sequence_cut_across_ranks_equals_one_process(tmp_path: Path, suite: str, part: str) -> None:
    """Outputs, states and gradients; and where the exchange is dropped, the same comparisons must fail."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path), suite, part],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "errors.json").read_text())  # {ranks: {check: {what: error}}}
    assert list(found) == ["1", "2", "3", "4"]
    wrong, unseen = [], []
    for ranks, checks in found.items():
        assert len(checks) > (25 if suite == "between pairs" else 50)
        for name, errors in checks.items():
            if not name.startswith("dropped"):
                wrong += [(ranks, name, what, error) for what, error in errors.items() if not error < 1e-10]
            elif ranks != "1":
                output = next(iter(errors.values()))
                gradient = max(error for what, error in errors.items() if what.startswith("d "))
                if not min(output, gradient) > 1e-2:
                    unseen.append((ranks, name, output, gradient))
    assert not wrong
    assert not unseen


@pytest.mark.timing
def test_all_scan_takes_the_time_of_its_model(tmp_path: Path) -> None:
    """On an emulated link: (P - 2 + b)(latency + t / b), least near the number of blocks that the link chooses."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_latency.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds = {int(b): s for b, s in json.loads((tmp_path / "seconds.json").read_text()).items()}
    size = 4 * math.prod(sharded_latency.STATE)
    link = shard.Link(sharded_latency.LATENCY, size / sharded_latency.WHOLE)
    for blocks, measured in seconds.items():
        model = link.seconds(sharded_latency.RANKS, size, blocks)
        assert 0.97 * model < measured < 1.4 * model + 0.03, (blocks, measured, model)
    best = link.blocks(sharded_latency.RANKS, size, sharded_latency.COLUMNS)
    assert best == 6
    assert min(seconds, key=lambda b: seconds[b]) in (3, 4, 6, 8, 12)
    assert seconds[best] < 0.75 * min(seconds[1], seconds[64])


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


def test_positions_begin_anew_with_each_document() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        batch = shard.SequenceShard(length=10)
        packed = shard.SequenceShard(length=10, documents=(0, 3, 7, 10))
        assert shard.positions(batch, 5).tolist() == [5, 6, 7, 8, 9]
        assert shard.positions(packed, 5).tolist() == [2, 3, 0, 1, 2]
    finally:
        dist.destroy_process_group()


def test_states_that_are_handed_on_need_no_shard() -> None:
    x, state = torch.randn(3, 5), torch.randn(3)
    y, after = shard.serial(lambda x, state: (x + state[:, None], state + x.sum(1)), [x], state)
    assert torch.equal(y, x + state[:, None])
    assert torch.equal(after, state + x.sum(1))


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


@pytest.mark.parametrize("spec", [*SUMMED, pytest.param(beside("running_average").SPEC, id="running_average")])
def test_asking_for_a_shard_breaks_no_graph(spec: OperatorSpec) -> None:
    inputs = spec.inputs(1, 9)
    given: dict[str, Any] = {**spec.without_state(inputs)}
    if spec.state_names:
        given["state"] = spec.state_tree(inputs)
    torch._dynamo.reset()  # to the compiler `run` is one function, which it traces for eight operators only

    def run() -> Any:
        return spec.function(**given)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, eager in zip(tree_leaves(compiled()), tree_leaves(run()), strict=True):
        assert relative_error(ours, eager) < 1e-14  # eager looks into the data for the order of its sums
