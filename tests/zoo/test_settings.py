"""The index of settings: what a config may set, known without importing what it names."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from zoo import cli, settings
from zoo.config import compose, parameters
from zoo.configs import ROOT
from zoo.errors import UsageError
from zoo.ranges import Range
from zoo.registry import resolve
from zoo.settings import NO_DEFAULT, Setting

# What takes seconds to import, and what nobody needs for a listing.
LIBRARIES = {
    "torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "datasets", "sentencepiece",
    "tokenizers", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "triton",
}  # fmt: skip
OURS = {"zoo.train", "zoo.layers", "zoo.ops", "zoo.bench"}
NOT_FOR = {
    ("config",): LIBRARIES | OURS,
    ("config", "model=hydra", "data=mqar", "strategy=zeco", "memory=auto", "optim.lr=1e-3"): LIBRARIES | OURS,
    ("list",): LIBRARIES | OURS | {"hydra", "omegaconf"},
    ("list", "--json"): LIBRARIES | OURS | {"hydra", "omegaconf"},
    ("show", "deltanet"): LIBRARIES - {"torch", "numpy", "triton"} | {"zoo.train"},
}


@pytest.mark.parametrize("words", NOT_FOR, ids=" ".join)
def test_a_listing_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from zoo.cli import main\n"
        f"assert main({list(words)!r}) == 0\n"
        f"heavy = sorted({NOT_FOR[words]!r} & set(sys.modules))\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_index_is_fresh() -> None:
    written = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("*/*.json")}
    assert settings.build_index() == written, "python -m zoo.registry writes it"


def test_the_index_says_what_the_class_says() -> None:
    for path in ROOT.glob("*/*.json"):
        asked = settings.settings_of(resolve(path.stem))
        known = settings.indexed(path.parent.name, path.stem)
        assert known is not None
        assert set(known) == set(asked)
        for name, setting in asked.items():
            assert known[name].type == setting.type
            assert known[name].range == setting.range
            plain = settings.is_plain(setting.default)
            assert known[name].default == (settings.as_plain(setting.default) if plain else NO_DEFAULT), (path, name)


def test_a_class_in_no_index_is_asked_itself() -> None:
    target = "lightning.pytorch.strategies.DDPStrategy"
    assert settings.indexed("strategy", target) is None
    assert "**" in parameters("strategy", target)


def test_the_index_of_one_group_serves_no_other() -> None:
    target = "zoo.train.optim.AdamW"
    assert settings.indexed("optim", target) is not None
    assert settings.indexed("data", target) is None


def test_ranges_of_a_constructor_are_read() -> None:
    def loader(*, rate: Annotated[float, Range(0, 1)] = 0.5, n: int, **more: object) -> None: ...

    assert settings.settings_of(loader) == {
        "rate": Setting("float", 0.5, Range(0, 1)), "n": Setting("int"), "**": Setting("Any"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("optim.weight_decay=-0.1", "optim.weight_decay must be at least 0, got -0.1"),
        ("optim.lr=0", "optim.lr must be above 0, got 0.0"),
        ("optim.lr=inf", "optim.lr must be finite, got inf"),
        ("optim.betas=[0.9,1]", "optim.betas must be in [0, 1), got [0.9, 1.0]"),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio must be in [0, 1], got 2.0"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1, got 0"),
        ("trainer.log_every=-1", "trainer.log_every must be at least 1, got -1"),
        ("model.n_heads=0", "field 'n_heads' of model 'deltanet' must be at least 1, got 0"),
        ("model.norm_eps=nan", "field 'norm_eps' of model 'deltanet' must be finite, got nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_there_is_a_folder(
    word: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", word]) == cli.USAGE
    assert capsys.readouterr().err == f"zoo: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_values_in_range_compose() -> None:
    config = compose(["optim.weight_decay=0", "optim.betas=[0,0.5]", "optim.eps=0", "trainer.max_steps=1"])
    assert config["optim"]["betas"] == [0.0, 0.5]
    with pytest.raises(UsageError, match="must be at least 1"):
        compose(["trainer.max_steps=-1"])
