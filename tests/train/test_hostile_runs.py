"""Folders of runs and checkpoints that try to run code: nothing runs, and the refusal is one sentence."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TinyData, config

import zoo
from zoo import cli, targets
from zoo.errors import UsageError
from zoo.registry import packages_with_models
from zoo.targets import allow_package, load_class, trusted_packages
from zoo.train.optim import AdamW
from zoo.train.run import fit

Change = Callable[[dict[str, Any], Path], None]


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a checkpoint and can go on, and a finished model of it."""
    run = tmp_path_factory.mktemp("harmless") / "run"
    assert fit.run(config(trainer__max_steps=2), run) == 0
    shutil.move(run / "checkpoint", run.parent / "model")
    return run


@pytest.fixture
def run(harmless: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(harmless, tmp_path / "run"))


@pytest.fixture
def model(harmless: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(harmless.parent / "model", tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that exists when code was run; importing the module `trap` makes it, too."""
    path = tmp_path / "marker"
    (tmp_path / "traps" / "trap").mkdir(parents=True)
    code = f"open({str(path)!r}, 'w').close()\nclass Thing: pass\n"
    for name in ("__init__", "inner", "__main__"):
        (tmp_path / "traps" / "trap" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "traps"))
    monkeypatch.setattr(targets, "_allowed", set())
    return path


def change(section: str, **values: Any) -> Change:
    """Put values, in which MARKER is the path of the marker, into a section."""

    def apply(settings: dict[str, Any], marker: Path) -> None:
        text = json.dumps(values | {"_target_": values["target"]} if "target" in values else values)
        new = json.loads(text.replace("MARKER", str(marker)))
        new.pop("target", None)
        settings[section] = new if "target" in values else {**(settings.get(section) or {}), **new}

    return apply


TOUCH = ["touch", "MARKER"]
CONFIGS: dict[str, Change] = {
    "check_output as data": change("data", target="subprocess.check_output", args=TOUCH),
    "os.system as data": change("data", target="os.system", command="touch MARKER"),
    "posix.system as data": change("data", target="posix.system", command="touch MARKER"),
    "builtins.eval as data": change("data", target="builtins.eval", _args_=["open('MARKER', 'w')"]),
    "builtins.open as data": change("data", target="builtins.open", file="MARKER", mode="w"),
    "pathlib as data": change("data", target="pathlib.Path.touch", self="MARKER"),
    "os.system as task": change("task", target="os.system", command="touch MARKER"),
    "subprocess.run as optim": change("optim", target="subprocess.run", args=TOUCH),
    "check_call as trainer": change("trainer", target="subprocess.check_call", args=TOUCH),
    "os.system as strategy": change("strategy", target="os.system", command="touch MARKER"),
    "Popen as logger": change("logger", target="subprocess.Popen", args=TOUCH),
    "Popen as memory": change("memory", target="subprocess.Popen", args=TOUCH),
    "a target where there is none": change("model", _target_="os.system", command="touch MARKER"),
    "a section of callbacks": change("callbacks", target="os.system", command="touch MARKER"),
    "a target in an argument": change("data", batch_size={"_target_": "os.system", "command": "touch MARKER"}),
    "a target in a list": change("data", metrics=[{"_target_": "os.system", "command": "touch MARKER"}]),
    "a target in a logger's open keywords": change(
        "logger", target="lightning.pytorch.loggers.WandbLogger", any={"_target_": "os.system", "command": "x"}
    ),
    "_partial_": change("optim", _partial_=True),
    "_args_": change("data", _args_=["MARKER"]),
    "an import with a side effect": change("data", target="trap.Thing"),
    "an import of a submodule": change("strategy", target="trap.inner.Thing"),
    "import_module": change("data", target="importlib.import_module", name="trap"),
    "runpy": change("data", target="runpy.run_module", mod_name="trap"),
    "os through a module of zoo": change("data", target="zoo.train.run.fit.os.system", command="touch MARKER"),
    "subprocess through a module of zoo": change(
        "optim", target="zoo.train.run.folder.subprocess.check_output", args=TOUCH
    ),
    "a foreign class in the right module": change("data", target="zoo.train.data.text.text_files.Path", args=TOUCH),
    "a foreign function in the right module": change(
        "data", target="zoo.train.data.text.text_files.datasets.load_dataset", path="MARKER"
    ),
    "a function of zoo": change("data", target="zoo.cli.sweep._spawn", command=TOUCH),
    "the command line of zoo": change("data", target="zoo.__main__.main"),
    "os through a trusted package": change("data", target="tiny.os.system", command="touch MARKER"),
    "a function of a trusted package": change("data", target="tiny.signal_at", number=0),
    "a class of another group": change("data", target="zoo.train.optim.AdamW"),
    "another kind of class": change("optim", target="tiny.TinyData"),
    "a base that cannot be made": change("optim", target="zoo.train.optim.Recipe"),
    "leading dots": change("data", target="..os.system", command="touch MARKER"),
    "dots in the middle": change("data", target="zoo.train.data..os.system", command="touch MARKER"),
    "a colon": change("data", target="os:system", command="touch MARKER"),
    "a path": change("data", target="../traps/trap.Thing"),
    "another alphabet": change("data", target="ｏｓ.system", command="touch MARKER"),
    "a list for a target": change("data", target=["os", "system"], command="touch MARKER"),
    "nothing for a target": change("data", target=None),
}


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """What a command ends with and says, which must be one sentence."""
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith("zoo: ")] == lines[-1:], captured.err + captured.out
    assert len(lines) == 1, captured.err
    for advice in ("weights_only", "trusted source", "trust the source", "Traceback"):
        assert advice not in captured.err + captured.out
    return code, lines[0]


def write(run: Path, name: str, marker: Path) -> None:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    CONFIGS[name](settings, marker)
    path.write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_runs_nothing(name: str, run: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, name, marker)
    for words in (["resume"], ["eval"], ["generate", "--max-tokens", "1"]):
        code, sentence = refusal(capsys, words[0], str(run), *words[1:])
        assert code == 1, sentence
        assert "config.yaml" in sentence
        assert not marker.exists(), words
    assert "trap" not in sys.modules


YAML_TAGS = {
    "apply": "data: !!python/object/apply:os.system ['touch MARKER']\n",
    "new": "data: !!python/object/new:subprocess.Popen [['touch', MARKER]]\n",
    "name": "data: {_target_: !!python/name:os.system }\n",
    "module": "data: !!python/module:trap\n",
    "object": "data: !!python/object:trap.Thing {}\n",
}


@pytest.mark.parametrize("name", YAML_TAGS)
def test_tags_of_yaml_run_nothing(name: str, run: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["data"]
    path.write_text(yaml.safe_dump(settings) + YAML_TAGS[name].replace("MARKER", str(marker)))
    for verb in ("resume", "eval"):
        code, sentence = refusal(capsys, verb, str(run))
        assert (code, "config.yaml is not a config" in sentence) == (1, True), sentence
    assert not marker.exists()


def test_an_interpolation_reads_nothing_of_the_machine(
    run: Path, marker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of-this-machine")
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["data"]["batch_size"] = "${oc.env:SECRET}"
    path.write_text(yaml.safe_dump(settings))
    code, sentence = refusal(capsys, "resume", str(run))
    assert (code, "of-this-machine" in sentence) == (1, False), sentence


def pickled(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Payload(marker)}, protocol=2))


def pickled_newer(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker)))


def inside(path: Path, marker: Path) -> None:
    content = torch.load(path, weights_only=True) if path.suffix == ".ckpt" else {}
    torch.save(content | {"zoo": Payload(marker)}, path)


def whole(path: Path, marker: Path) -> None:
    torch.save(Payload(marker), path)


@pytest.mark.parametrize("spoil", [pickled, pickled_newer, inside, whole])
def test_a_hostile_checkpoint_of_the_trainer_runs_nothing(
    spoil: Callable[[Path, Path], None], run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run / "checkpoints" / "last.ckpt", marker)
    for words in (["resume"], ["eval"], ["generate", "--max-tokens", "1"]):
        code, sentence = refusal(capsys, words[0], str(run), *words[1:])
        assert (code, "last.ckpt" in sentence) == (1, True), sentence
        assert not marker.exists(), words


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("spoil", [pickled, pickled_newer, inside, whole])
def test_hostile_weights_run_nothing(
    spoil: Callable[[Path, Path], None], name: str, model: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    spoil(model / name, marker)
    for words in (["generate"], ["eval"], ["convert"]):
        code, sentence = refusal(capsys, words[0], str(model), *([str(marker) + "-out"] if "convert" in words else []))
        assert (code, name in sentence) == (1, True), sentence
        assert not marker.exists(), words


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "a name with dots": {"model": "os.system"},
    "a name of a module": {"model": "trap.Thing"},
    "a path": {"model": "../../../traps/trap/inner"},
    "a target among the fields": {"config": {"_target_": "os.system", "command": "touch MARKER"}},
    "a size that is code": {"size": "__import__('trap')"},
    "code that another library would fetch": {
        "format": None, "model_type": "trap", "auto_map": {"AutoModel": "trap.Thing"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_hostile_description_runs_nothing(
    name: str, model: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "config.json"
    described = json.loads(path.read_text()) | DESCRIPTIONS[name]
    path.write_text(json.dumps({k: v for k, v in described.items() if v is not None}).replace("MARKER", str(marker)))
    for verb in ("generate", "eval"):
        code, sentence = refusal(capsys, verb, str(model))
        assert code in (1, 2), sentence
    assert not marker.exists()
    assert "trap" not in sys.modules


# -- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["data._target_=os.system", "+data.command=touch MARKER"],
        ["optim._target_=subprocess.check_output", "+optim.args=[touch,MARKER]"],
        ["task._target_=trap.Thing"],
        ["strategy=ddp", "strategy._target_=trap.inner.Thing"],
        ["+logger._target_=trap.Thing"],
        ["+data.extra={_target_: trap.Thing}"],
        ["+callbacks._target_=trap.Thing"],
    ],
)
def test_a_hostile_override_is_refused_when_it_is_composed(
    words: list[str], marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("MARKER", str(marker)) for word in words]
    for verb in (["config"], ["train", f"run_dir={tmp_path / 'new'}"]):
        code, sentence = refusal(capsys, *verb, *words)
        assert code == 2, sentence
    assert not marker.exists()
    assert not (tmp_path / "new").exists()


def test_an_override_of_an_evaluation_cannot_name_a_class(
    run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["data._target_=trap.Thing"], ["data=parity", "data._target_=trap.Thing"]):
        assert refusal(capsys, "eval", str(run), *words)[0] == 2
    assert not marker.exists()


# -- who is trusted ----------------------------------------------------------------------------------------------


def test_a_package_is_trusted_by_a_call_or_a_variable(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "traps" / "friend.py").write_text(
        "import os\nfrom lightning.pytorch import LightningDataModule\nfrom tiny import TinyData\n"
        "class Data(LightningDataModule): pass\n"
    )
    with pytest.raises(UsageError, match="add friend to ZOO_ALLOW_PACKAGES"):
        load_class("data", "friend.Data")
    assert "friend" not in sys.modules
    monkeypatch.setenv("ZOO_ALLOW_PACKAGES", "other, friend")
    assert load_class("data", "friend.Data").__name__ == "Data"
    monkeypatch.delenv("ZOO_ALLOW_PACKAGES")
    with pytest.raises(UsageError, match="that you trust, and friend"):
        load_class("data", "friend.Data")
    zoo.allow_package("friend")
    assert load_class("data", "friend.Data").__name__ == "Data"
    for target in ("friend.os.system", "friend.LightningDataModule", "friend.Missing"):
        with pytest.raises(UsageError):
            load_class("data", target)
    with pytest.raises(UsageError, match=r"must name a Recipe, and friend\.Data is none"):
        load_class("optim", "friend.Data")
    allow_package("trap")
    with pytest.raises(UsageError, match=r"trap\.__main__"):
        load_class("data", "trap.__main__.Thing")
    with pytest.raises(UsageError, match="by its top-level name"):
        allow_package("friend.inner")
    monkeypatch.delitem(sys.modules, "friend")


def test_a_package_with_a_model_of_zoo_is_trusted(marker: Path) -> None:
    assert "tiny" in packages_with_models()
    assert "tiny" in trusted_packages()
    assert "zoo" not in trusted_packages()
    assert load_class("data", "tiny.TinyData").__name__ == TinyData.__name__


def test_what_the_configs_of_zoo_name_can_be_made() -> None:
    for group in targets.KINDS:
        for target in targets._shipped(group) - {"None"}:
            assert load_class(group, target).__name__ == target.rpartition(".")[2]
    assert load_class("optim", "zoo.train.optim.AdamW") is AdamW
    with pytest.raises(UsageError, match=r"loggers\.MLFlowLogger is none, so it was not imported"):
        load_class("logger", "lightning.pytorch.loggers.MLFlowLogger")
