"""Strategies are a method and a place of the weights; every name of before still makes the same strategy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from zoo.config import check, compose
from zoo.configs import ROOT, choices
from zoo.errors import UsageError, UserError
from zoo.train.run.instantiate import strategy_of
from zoo.train.strategies import (
    BalancedFSDPStrategy,
    BalancedStrategy,
    ContextParallelFSDPStrategy,
    ContextParallelStrategy,
    register,
)
from zoo.train.strategies.settings import CrossingSettings, PlanSettings

# Every name that there was when each had a file of its own, with what the file said.
CROSSINGS: dict[str, dict[str, Any]] = {
    "allgather": {"method": "allgather", "attention": "allgather"},
    "heads": {"method": "heads", "attention": "ulysses"},
    "lasp": {"method": "lasp"},
    "lasp2": {"method": "lasp2"},
    "lasp2h": {"method": "lasp2", "attention": "allgather"},
    "lightseq": {"attention": "lightseq"},
    "ring": {"attention": "ring"},
    "striped": {"attention": "striped"},
    "tokenring": {"attention": "tokenring"},
    "ulysses": {"attention": "ulysses"},
    "usp": {"attention": "usp"},
    "zeco": {"method": "zeco"},
    "zigzag": {"attention": "zigzag"},
}
CLASSES = {
    "": (ContextParallelStrategy, BalancedStrategy),
    "_fsdp": (ContextParallelFSDPStrategy, BalancedFSDPStrategy),
}
BEFORE = {
    f"{name}{ending}": (classes[0], CrossingSettings(**settings))
    for ending, classes in CLASSES.items()
    for name, settings in CROSSINGS.items()
} | {f"balanced{ending}": (classes[1], PlanSettings()) for ending, classes in CLASSES.items()}


@pytest.mark.parametrize("name", BEFORE)
def test_a_name_of_before_makes_the_same_strategy(name: str) -> None:
    owner, settings = BEFORE[name]
    for made in (strategy_of(compose([f"strategy={name}"])["strategy"]), StrategyRegistry.get(name)):
        assert type(made) is owner
        assert made.settings == settings


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_of_before_makes_the_same_strategy(name: str) -> None:
    """Its config names the class by the weights, and has no setting for them."""
    owner, settings = BEFORE[name]
    given = CROSSINGS.get(name.removesuffix("_fsdp"), {})
    section = {"_target_": f"zoo.train.strategies.{owner.__name__}", **given, "timeout": 60.0}
    made = strategy_of(check({**compose([]), "strategy": section})["strategy"])
    assert type(made) is owner
    assert made.settings == replace(settings, timeout=60.0)  # type: ignore[type-var]


def test_the_names_are_the_files_times_the_weights() -> None:
    assert sorted(register()) == sorted(BEFORE)
    files = {path.stem for path in Path(ROOT / "strategy").glob("*.yaml")}
    assert files == {*CROSSINGS, "balanced", "auto", "ddp"}
    assert set(choices()["strategy"]) == files


def test_weights_are_a_setting() -> None:
    cut = compose(["strategy=zeco", "strategy.weights=fsdp", "strategy.cp_size=2"])
    assert cut == compose(["strategy=zeco_fsdp", "strategy.cp_size=2"])
    assert (cut["strategy"]["weights"], cut["strategy"]["method"]) == ("fsdp", "zeco")
    made = strategy_of(cut["strategy"])
    assert type(made) is ContextParallelFSDPStrategy
    assert made.settings == CrossingSettings(method="zeco", cp_size=2)
    assert type(ContextParallelStrategy(weights="ddp")) is ContextParallelStrategy
    assert compose(["strategy=zeco_fsdp", "strategy.weights=ddp"]) == compose(["strategy=zeco"])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy.weights must be one of ddp, fsdp; got 'zero'"):
        ContextParallelStrategy(weights="zero")
    with pytest.raises(UserError, match=r"strategy.static_graph is for weights on every rank, and .*fsdp"):
        ContextParallelStrategy(weights="fsdp", static_graph=True)
    with pytest.raises(UsageError, match="no strategy 'zeco_zero'"):
        compose(["strategy=zeco_zero"])
    with pytest.raises(UsageError, match="no strategy 'auto_fsdp'"):
        compose(["strategy=auto_fsdp"])
    with pytest.raises(UserError, match="hybrid gives ranks unequal numbers"):
        BalancedStrategy(weights="fsdp", planner="hybrid")


def test_a_strategy_of_ones_own_keeps_whole_weights() -> None:
    class Mine(ContextParallelStrategy):
        pass

    mine = Mine(method="lasp")
    assert isinstance(mine, DDPStrategy)
    assert mine.settings.method == "lasp"
    with pytest.raises(UserError, match=r"strategy.weights must be ddp for Mine"):
        Mine(weights="fsdp")


def test_a_file_says_only_what_differs() -> None:
    for name, settings in CROSSINGS.items():
        text = yaml.safe_load((ROOT / "strategy" / f"{name}.yaml").read_text())
        assert text == {"_target_": "zoo.train.strategies.ContextParallelStrategy", "weights": "ddp", **settings}
