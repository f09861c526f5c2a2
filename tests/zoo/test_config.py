"""From overrides to one checked config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from zoo import targets
from zoo.config import compose, fixed, parse_fields, read_yaml, sweep, to_yaml
from zoo.configs import DECODER, GROUPS, ROOT, choices
from zoo.errors import UsageError, UserError
from zoo.settings import settings_of
from zoo.train.optim import Recipe


@dataclass(frozen=True, kw_only=True)
class Optim(Recipe):
    """As a dataclass behind a group."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 50
    precision: str | None = None
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"optim.warmup_steps must be 0 or more, got {self.warmup_steps}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters())

    def lr_at(self, step: int, progress: float) -> float:
        return self.lr


class Data(LightningDataModule):
    """As a data module behind a group."""

    def __init__(
        self, *, path: str | Path, folders: tuple[str, ...] = (), seed: int = 0, module: nn.Module | None = None
    ):
        super().__init__()
        self.path = path


class InheritedData(Data):
    """A class annotation is not the type of the constructor's parameter of the same name."""

    place: nn.Module


class Anything(DummyLogger):
    def __init__(self, **settings: object):
        self.settings = settings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """YAML files of a user's own, over zoo's, that name classes of a package that the user trusts."""
    monkeypatch.setattr(targets, "_allowed", {__name__.partition(".")[0]})
    mine = tmp_path / "my configs"
    written = {
        "optim/mine.yaml": f"_target_: {__name__}.Optim\nlr: 1e-3\n",
        "data/mine.yaml": f"_target_: {__name__}.InheritedData\npath: ???\n",
        "logger/any.yaml": f"_target_: {__name__}.Anything\nproject: zoo\n",
        "strategy/none.yaml": "_target_: no.such.module\n",
        "trainer/plain.yaml": "steps: 3\n",
        "task/plain.yaml": "{}\n",
        "model/toy.yaml": "name: toy\nsize: tiny\n",
        "experiment/row.yaml": "\n".join(
            ["# @package _global_", "defaults:", "  - override /model: toy", "model:", "  d_model: 24", "seed: 7"]
        ),
    }
    for name, text in written.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(text)
    return mine


@pytest.fixture
def composed(folder):

    def compose_mine(*overrides):
        chosen = ["model=toy", "data=mine", "data.path=x", "optim=mine", "trainer=plain", "task=plain", *overrides]
        return compose(chosen, config_dir=folder)

    return compose_mine


def test_every_default_is_filled_in(composed):
    config = composed()
    assert config["model"] == {
        "name": "toy", "size": "tiny", "d_model": 8, "n_layers": 2, "dropout": 0.0, "tied": True, "pattern": None,
        "dims": [1, 2], "vocab_size": None,
    }  # fmt: skip
    assert config["optim"] == {
        "_target_": f"{__name__}.Optim", "lr": 1e-3, "betas": [0.9, 0.95], "warmup_steps": 50, "precision": None,
        "kind": "a",
    }  # fmt: skip
    assert config["data"] == {"_target_": f"{__name__}.InheritedData", "path": "x", "folders": [], "seed": 0}
    assert config["trainer"] == {"steps": 3}
    assert (config["seed"], config["run_dir"]) == (0, None)
    assert set(config) == {*GROUPS, "seed", "run_dir", "init_from", "ema"} - {"experiment"}


def test_values_reach_their_place_in_their_type(composed):
    config = composed(
        "model.size=big", "model.n_layers=3", "model.dims=[5,6]", "model.pattern='a*3, b(c=1)'", "model.vocab_size=99",
        "optim.lr=3", "optim.warmup_steps=1e2", "optim.precision=32", "optim.betas=[0,1]", "seed=5", "run_dir=2024",
        "trainer.steps=9", "+note=hello", "data.path=007", "model.dropout=${optim.lr}",
    )  # fmt: skip
    assert config["model"]["d_model"] == 16
    assert (config["model"]["n_layers"], config["model"]["dims"]) == (3, [5, 6])
    assert (config["model"]["pattern"], config["model"]["vocab_size"]) == ("a*3, b(c=1)", 99)
    assert (config["optim"]["lr"], type(config["optim"]["lr"])) == (3.0, float)
    assert (config["optim"]["warmup_steps"], type(config["optim"]["warmup_steps"])) == (100, int)
    assert config["optim"]["precision"] == "32"
    assert config["optim"]["betas"] == [0.0, 1.0]
    assert (config["seed"], config["run_dir"], config["note"]) == (5, "2024", "hello")
    assert config["data"]["path"] == "007"
    assert config["model"]["dropout"] == 3.0


def test_the_seed_of_the_run_is_the_seed_of_the_data(composed):
    assert composed("seed=5")["data"]["seed"] == 5
    assert composed("seed=5", "data.seed=6")["data"]["seed"] == 6


def test_an_experiment_is_a_file_of_overrides(composed):
    config = composed("experiment=row", "model.n_layers=1")
    assert (config["model"]["d_model"], config["model"]["n_layers"], config["seed"]) == (24, 1, 7)


def test_a_class_with_open_keywords_takes_any_key(composed):
    assert composed("logger=any", "logger.tag=x")["logger"] == {
        "_target_": f"{__name__}.Anything", "project": "zoo", "tag": "x",
    }  # fmt: skip


def test_a_key_can_be_taken_back(composed):
    assert composed("~optim.lr")["optim"]["lr"] == 2e-3


def test_a_model_without_a_yaml_file_can_be_chosen(folder):
    (folder / "model" / "toy.yaml").unlink()
    chosen = ["model=toy", "model.size=big", "data=mine", "data.path=x", "optim=mine", "trainer=plain", "task=plain"]
    assert compose(chosen, config_dir=folder)["model"]["d_model"] == 16


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model=toi", "no model 'toi'; did you mean 'toy'? model can be "),
        ("data=mime", "no data 'mime'; did you mean 'mine'? data can be "),
        ("data=zzzz", "no data 'zzzz'; data can be "),
        ("modle=toy", "no setting 'modle'; did you mean 'model'? zoo config prints all settings"),
        ("sede=1", "no setting 'sede'; did you mean 'seed'? zoo config prints all settings"),
        ("optim.l=1", "no setting 'optim.l'; did you mean 'optim.lr'?"),
        ("+optim.momentum=1", "no setting 'optim.momentum'; "),
        ("data.module=1", "no setting 'data.module'; did you mean"),
        ("trainer.stepps=1", "no setting 'trainer.stepps'; did you mean 'trainer.steps'?"),
        ("model.d_modle=1", "model 'toy' has no field 'd_modle'; did you mean 'd_model'? zoo show toy lists them"),
        ("model.size=bg", "no size 'bg' of model 'toy'; did you mean 'big'? it has tiny, big"),
        ("model.d_model=wide", "field 'd_model' of model 'toy' must be int, got 'wide' (str)"),
        ("optim.lr=fast", "optim.lr must be float, got 'fast' (str)"),
        ("optim.lr=null", "optim.lr must be float, got None (NoneType)"),
        ("optim.kind=c", "optim.kind must be 'a' or 'b', got 'c' (str)"),
        ("optim.warmup_steps=-1", "optim.warmup_steps must be 0 or more, got -1"),
        ("optim.betas=[1]", "optim.betas must be tuple[float, float], got [1] (list)"),
        ("seed=x", "seed must be int, got 'x' (str)"),
        ("data.path=???", "data.path must be given; add data.path=..."),
        ("optim=3", "optim= chooses by name, got 3; to change one setting write optim.KEY=VALUE"),
        ("optim={lr: 1}", "optim= chooses by name, got {'lr': 1}"),
        ("seed", "settings are written key=value, got 'seed'; zoo config prints all settings"),
        ("model.pattern=a(b=1)", "'model.pattern=a(b=1)' cannot be read: 'a(b=1)': Unknown function 'a'; quote text"),
        ("model.d_model=${nowhere}", "the settings do not compose: Interpolation key 'nowhere' not found"),
        ("~model", "a config needs a model; add model=NAME, zoo list shows all"),
        ("~optim.no", "the settings do not compose: Could not delete"),
        (
            "strategy=none",
            "strategy._target_ must name a class of zoo or of a package that you trust, and no.such.module",
        ),
        ("seed=1,2", "seed=1,2 gives several values, and one run takes one; zoo train -m runs them all"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(composed, override, sentence):
    with pytest.raises(UsageError) as refused:
        composed(override)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_a_value_that_must_be_given(folder):
    chosen = ["model=toy", "data=mine", "optim=mine", "trainer=plain", "task=plain"]
    with pytest.raises(UsageError, match=r"^data.path must be given; add data.path=\.\.\.$"):
        compose(chosen, config_dir=folder)


def test_a_config_dir_that_is_none():
    with pytest.raises(UsageError, match="--config-dir must be a folder"):
        compose([], config_dir=Path("no/such/folder"))


def test_it_works_from_any_folder_and_leaves_hydra_as_it_was(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = composed("seed=3")
    assert composed("seed=3") == first


def test_yaml_there_and_back(composed, tmp_path):
    config = composed("optim.lr=1e-5", "run_dir='no'", "model.pattern='a: b, #c'")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_yaml(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match="is not a config"):
        read_yaml(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="it holds list, not settings by name"):
        read_yaml(tmp_path / "config.yaml")


def test_a_sweep_is_the_product_of_its_values():
    words = ["model=gla,deltanet", "optim.lr=1e-3,3e-3", "seed=range(1,3)", "data.path='a,b'", "x=[1,2]"]
    runs = sweep(words)
    assert len(runs) == 8
    assert runs[0] == {"model": "gla", "optim.lr": "0.001", "seed": "1"}
    assert runs[-1] == {"model": "deltanet", "optim.lr": "0.003", "seed": "2"}
    assert fixed(words) == ["data.path='a,b'", "x=[1,2]"]
    assert sweep(["seed=1"]) == [{}]
    with pytest.raises(UsageError, match="is an interval"):
        sweep(["optim.lr=interval(0,1)"])


def test_fields_of_show():
    assert parse_fields(["d_model=3", "pattern='a, b'", "dims=[1,2]"]) == {
        "d_model": 3,
        "pattern": "a, b",
        "dims": [1, 2],
    }
    with pytest.raises(UsageError, match="a field takes one value"):
        parse_fields(["d_model=3,4"])


def test_the_groups_are_the_folders():
    assert {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"} <= {*GROUPS, DECODER}
    assert "deltanet" in choices()["model"]


def test_the_keys_of_a_class_are_what_plain_values_can_fill():
    known = settings_of(Trainer)
    assert known["max_steps"].type == "int"
    assert "callbacks" not in known
    assert "**" in settings_of(WandbLogger)
