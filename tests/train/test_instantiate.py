"""Settings become objects in one place, and Lightning's Trainer is made in one place."""

import ast
from pathlib import Path

import pytest
from tiny import TinyData, config

from zoo.errors import UsageError
from zoo.train.optim import AdamW
from zoo.train.run.instantiate import instantiate, strategy_of
from zoo.train.run.trainer import TrainerConfig, make_trainer

ROOT = Path(__file__).parents[2]


def callers(function: str) -> set[str]:
    """The files of the package that call a function or class by this name."""
    files = set()
    for folder in ("train", "zoo"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                    files.add(str(path.relative_to(ROOT)))
    return files


def test_one_place_each() -> None:
    assert callers("Trainer") == {"train/run/trainer.py"}
    assert callers("load_class") == {
        "train/run/instantiate.py",
        "zoo/config.py",  # reads what a class takes
        "zoo/cli/generate.py",  # makes a decoder, without all that trains
    }


def test_the_seed_of_the_run_goes_where_it_is_taken_and_not_given() -> None:
    section = config()["data"]
    assert instantiate("data", section, seed=5).seed == 5
    assert instantiate("data", {**section, "seed": 3}, seed=5).seed == 3
    assert isinstance(instantiate("data", section, seed=5, no_such_setting=1), TinyData)
    assert isinstance(instantiate("optim", config()["optim"], seed=5), AdamW)


def test_a_group_with_a_class_of_its_own_needs_no_target() -> None:
    assert instantiate("trainer", {"max_steps": 3}) == TrainerConfig(max_steps=3)
    with pytest.raises(UsageError, match=r"strategy._target_ must be the dotted name of a class, got None"):
        instantiate("strategy", {})
    assert strategy_of({}) == strategy_of(None) == "auto"


def test_what_a_class_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"trainer.max_steps"):
        instantiate("trainer", {"max_steps": 0})


def test_what_lightning_refuses_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"trainer settings that Lightning refuses: .*no_such_precision"):
        make_trainer(TrainerConfig(accelerator="cpu", precision="no_such_precision"), "auto")
    trainer = make_trainer(TrainerConfig(accelerator="cpu", devices=1), {})
    assert (trainer.loggers, trainer.checkpoint_callbacks) == ([], [])
