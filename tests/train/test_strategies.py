"""Training cut along time equals training in one process; the processes are in sharded_training.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from sharded_cases_training import CASES, OWN, OwnMixer

from zoo.errors import UserError
from zoo.ops import attention, causal_conv1d, gated_linear_attention
from zoo.registry import create_model
from zoo.train.strategies import ContextParallelFSDPStrategy, ContextParallelStrategy
from zoo.train.strategies.kinds import kinds, refuse_uncuttable, refuse_undeclared


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_training.py")), str(folder)],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text()), folder


@pytest.mark.everything
@pytest.mark.parametrize("case", [c for c in CASES if not c.refused], ids=lambda case: case.name)
def test_a_training_cut_along_time_equals_one_process(case: Any, found: tuple[dict[str, Any], Path]) -> None:
    """Losses and weights, with clipping, unequal numbers of targets and a stretch without any; metrics, too."""
    one = found[0][case.like or case.name]
    whole = one["1x1" if "1x1" in one else "2x1"][0]  # some draw by the rank of the data
    assert set(found[0][case.name]) == {f"{dp}x{cp}" for dp, cp in case.layouts}
    tolerance = 1e-10 if case.double else 1e-3
    for layout, ranks in found[0][case.name].items():
        assert len(ranks) == eval(layout.replace("x", "*"))
        for rank, result in enumerate(ranks):
            losses = whole["losses"][-len(result["losses"]) :]
            assert result["losses"] == pytest.approx(losses, rel=tolerance, abs=0), (layout, rank)
            if result["weights"] and case.double:  # FSDP gathers them on the first rank; bf16 rounds
                weights = torch.tensor(result["weights"]) - torch.tensor(whole["weights"])
                assert weights.abs().max() < 1e-10, (layout, rank)
            assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-5 if case.double else 1e-3)
        assert ranks[0]["weights"]


@pytest.mark.everything
def test_the_comparison_can_fail(found: tuple[dict[str, Any], Path]) -> None:
    """Other data give other weights: three updates move them far beyond the tolerance."""
    one, other = (torch.tensor(found[0][name]["1x1"][0]["weights"]) for name in ("gla", "longer"))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.everything
@pytest.mark.parametrize("case", [c for c in CASES if c.refused], ids=lambda case: case.name)
def test_what_cannot_be_cut_is_refused_on_every_rank(case: Any, found: tuple[dict[str, Any], Path]) -> None:
    for ranks in found[0][case.name].values():
        for result in ranks:
            assert result["error"].startswith("UserError: ")
            assert case.refused in result["error"]


@pytest.mark.everything
def test_groups_with_other_data_drop_other_numbers(found: tuple[dict[str, Any], Path]) -> None:
    """And dropout drops: the losses are not those without it."""
    for layout, ranks in found[0]["dropout groups"].items():
        cp = int(layout[2:])
        assert [result["streams"] for result in ranks] == [[rank // cp] for rank in range(len(ranks))]
    assert found[0]["dropout"]["1x1"][0]["losses"][0] != found[0]["gla"]["1x1"][0]["losses"][0]


@pytest.mark.everything
def test_whole_sequences_are_judged_across_ranks_and_counted_once(found: tuple[dict[str, Any], Path]) -> None:
    for ranks in found[0]["sequences"].values():
        for result in ranks:
            assert len(result) == 6
            for name, counts in result.items():
                assert counts[0] == counts[1], name
            assert result["contiguous, True"][1][2] == 3  # right ones, of five with a token


@pytest.mark.everything
def test_no_group_outlives_a_fit(found: tuple[dict[str, Any], Path]) -> None:
    for case in CASES:
        if not case.refused and not case.fsdp:
            for layout, ranks in found[0].get(case.name, {}).items():
                opened = int(case.name == "gla" and layout in ("1x2", "2x2"))  # a world's first fit opens WORLD
                assert all(result["groups"] <= opened for result in ranks), (case.name, layout)


@pytest.mark.everything
def test_checkpoints_carry_no_trace_of_the_ranks(found: tuple[dict[str, Any], Path]) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): shape(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [shape(v) for v in value]
        return (str(value.dtype), tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__

    one, two, fsdp = (
        torch.load(found[1] / f"{name}.ckpt", weights_only=True) for name in ("gla-1x1", "gla-1x2", "fsdp-1x2")
    )
    assert shape(one) == shape(two)
    for key in ("state_dict", "optimizer_states"):
        assert shape(one[key]) == shape(fsdp[key])


def test_a_name_is_enough_for_lightning() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="lasp2h", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, ContextParallelStrategy)
    assert (trainer.strategy.cp_size, trainer.strategy.dp_size) == (2, 1)
    assert trainer.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp_size": 3}, r"cp_size must divide the 4 ranks .* got 3"),
        ({"cp_size": 4, "attention": "usp", "inner": 3}, r"inner must divide strategy.cp_size = 4; got 3"),
        ({"cp_size": 0}, r"cp_size must be at least 1, or null for all ranks; got 0"),
        ({"method": "zecco"}, r"method must be one of allgather, .* got 'zecco'"),
        ({"timeout": 0.0}, r"timeout must be above 0 seconds; got 0"),
    ],
)
@pytest.mark.parametrize("strategy", [ContextParallelStrategy, ContextParallelFSDPStrategy])
def test_settings_are_refused_before_anything_starts(strategy: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy(**settings), logger=False)


class Declaring(OwnMixer):
    operators = (causal_conv1d, gated_linear_attention)


def test_kinds_are_those_of_the_declared_operators() -> None:
    assert kinds(torch.nn.Sequential(Declaring())) == {"affine": {"Declaring"}, "halo": {"Declaring"}}
    assert kinds(OWN["own"]()) == {}  # says nothing, and is cut all the same: the case "own" above
    assert "attention" not in kinds(create_model("mamba"))
    assert kinds(create_model("transformer"))["attention"] == {"Attention"}
    hybrid = kinds(create_model("gla", pattern="gla, attention"))
    assert {"affine", "attention"} <= set(hybrid)
    refuse_uncuttable(create_model("transformer"), "zigzag")
    refuse_uncuttable(torch.nn.Conv1d(3, 3, 1), "contiguous")  # one tap sees no past
    with pytest.raises(UserError, match=r"the model \(Conv1d\) goes along time"):
        refuse_uncuttable(torch.nn.Conv1d(3, 3, 2), "contiguous")


class OwnAttention(torch.nn.Module):
    """A user's own layer that does not say what it calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (1, -1))
        return attention(q, q, q).flatten(2)


def test_attention_that_nobody_declares_is_refused_where_plans_depend_on_it() -> None:
    x, own = torch.randn(1, 4, 8), OwnAttention()
    refusal = pytest.raises(UserError, match=r"attention is called by a layer that does not, add operators = \(zoo.ops")
    with refusal, refuse_undeclared(own, ["attention"]):
        own(x)
    with refuse_undeclared(own, ["affine"]):
        own(x)
    declaring = type("Declaring", (OwnAttention,), {"operators": (attention,)})()
    with refuse_undeclared(declaring, ["attention"]):
        declaring(x)


def test_a_declaration_of_no_operator_is_refused() -> None:
    wrong = type("Wrong", (torch.nn.Module,), {"operators": (torch.relu,)})()
    with pytest.raises(ValueError, match=r"Wrong.operators must name public operators of zoo.ops .*; got"):
        kinds(wrong)
