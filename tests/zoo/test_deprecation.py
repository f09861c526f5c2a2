"""An old name of a model, a field or a strategy keeps working, with one warning that names the new one."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

import zoo
import zoo.train.strategies
from zoo import _deprecation, configs, registry
from zoo._deprecation import RenamedWarning, current_name, renamed_from
from zoo.config import check, compose
from zoo.errors import UsageError
from zoo.targets import MOVED
from zoo.train.strategies import ContextParallelStrategy, presets


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    width: int = field(default=4, metadata=renamed_from("d", "dim"))
    vocab_size: int = 11


@pytest.fixture(autouse=True)
def small(toy: object) -> Iterator[None]:
    """A model and a strategy that had other names before, and no warning given yet."""

    def build(config: SmallConfig) -> nn.Module:
        return nn.Linear(config.width, config.vocab_size)

    registry.register("small", config=SmallConfig, sizes={"tiny": {}}, renamed_from=("little", "wee"))(build)
    _deprecation._warn.cache_clear()
    yield
    _deprecation._warn.cache_clear()


def says(kind: str, old: str, new: str) -> str:
    return f"^{kind} '{old}' is called '{new}' now; write '{new}'$"


def test_an_old_model_is_the_new_one() -> None:
    with pytest.warns(RenamedWarning, match=says("model", "little", "small")):
        model = zoo.create_model("little", width=3)
    assert (model.name, model.in_features) == ("small", 3)
    assert "little" not in zoo.list_models()


def test_one_warning_a_process_and_name() -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            zoo.create_model("little")
            zoo.model_info("little")
        zoo.create_model("wee")
    assert [str(w.message) for w in given] == [
        "model 'little' is called 'small' now; write 'small'",
        "model 'wee' is called 'small' now; write 'small'",
    ]
    assert {w.category for w in given} == {RenamedWarning}
    assert issubclass(RenamedWarning, DeprecationWarning)
    assert {w.filename for w in given} == {__file__}, "the warning points at the line to change"


def test_names_of_today_are_silent(recwarn: pytest.WarningsRecorder) -> None:
    zoo.create_model("small", width=3)
    compose(["model=gla", "strategy=zeco"])
    assert [w for w in recwarn if issubclass(w.category, RenamedWarning)] == []


@pytest.mark.parametrize("old", ["d", "dim"])
def test_an_old_field_sets_the_new_one(old: str) -> None:
    with pytest.warns(RenamedWarning, match=says("field of model 'small'", old, "width")):
        assert zoo.create_model("small", **{old: 7}).in_features == 7


def test_a_field_is_not_given_twice() -> None:
    for words in ({"width": 3, "d": 4}, {"d": 4, "width": 3}, {"d": 4, "dim": 4}):
        with (
            pytest.warns(RenamedWarning),
            pytest.raises(UsageError, match=r"^model 'small' takes 'width' once, and '\w+' is an old name of it"),
        ):
            zoo.create_model("small", **words)
        _deprecation._warn.cache_clear()


def test_an_old_model_trains_by_its_settings() -> None:
    with pytest.warns(RenamedWarning) as given:
        section = compose(["model=little", "model.dim=9"])["model"]
    assert (section["name"], section["width"]) == ("small", 9)
    assert "dim" not in section
    assert len(given) == 2


def test_an_unknown_name_is_still_refused() -> None:
    with pytest.raises(UsageError, match=r"^no model 'smal'; did you mean 'small'\?"):
        zoo.create_model("smal")
    assert current_name("model", "smal", {"little": "small"}) == "smal"


def test_an_old_strategy_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.RENAMED, "strategy", {"all_scan": "zeco"})
    with pytest.warns(RenamedWarning, match=says("strategy", "all_scan", "zeco")):
        assert compose(["model=gla", "strategy=all_scan", "strategy.cp_size=2"]) == compose(
            ["model=gla", "strategy=zeco", "strategy.cp_size=2"]
        )
    _deprecation._warn.cache_clear()
    presets.register()
    try:
        with pytest.warns(RenamedWarning, match=says("strategy", "all_scan", "zeco")):
            strategy = StrategyRegistry.get("all_scan")
        assert isinstance(strategy, ContextParallelStrategy)
    finally:
        StrategyRegistry.remove("all_scan")


def test_old_choices_lead_to_choices_of_today() -> None:
    for group, names in configs.RENAMED.items():
        for old, new in names.items():
            assert new in configs.choices()[group]
            assert old not in configs.choices()[group]


def test_a_checkpoint_with_old_names_loads(tmp_path: Path) -> None:
    model = zoo.create_model("small", width=5)
    zoo.save(model, tmp_path / "new")
    described = (tmp_path / "new" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "new" / "config.json").write_text(
        described.replace('"small"', '"little"').replace('"width"', '"dim"'), encoding="utf-8"
    )
    with pytest.warns(RenamedWarning) as given:
        again = zoo.load(tmp_path / "new")
    assert len(given) == 2
    assert torch.equal(again.weight, model.weight)


def test_a_script_shows_the_warning_without_being_asked(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "from zoo._deprecation import current_name\ncurrent_name('model', 'a', {'a': 'b'})\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert "script.py:2: RenamedWarning: model 'a' is called 'b' now; write 'b'" in done.stderr


def test_a_run_of_before_names_classes_where_they_lay() -> None:
    """Its config.yaml was written by zoo, not by the user, so no word is said."""
    today = compose(["model=gla", "data=mqar"])
    assert today["data"]["_target_"] == "zoo.train.data.synthetic.mqar.MQAR"
    then = {**today, "data": {**today["data"], "_target_": "zoo.train.data.mqar.MQAR"}}
    assert check(then) == today


@pytest.mark.parametrize("module", sorted(MOVED))
def test_what_moved_is_there_and_nothing_is_where_it_was(module: str) -> None:
    assert find_spec(MOVED[module]) is not None
    assert find_spec(module) is None
