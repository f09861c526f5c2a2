"""The config of an earlier run names classes by where they lay; the run goes on, and says nothing nobody can mend."""

import shutil
import warnings
from pathlib import Path

from tiny import config

from zoo._deprecation import RenamedWarning
from zoo.config import read_run
from zoo.targets import MOVED, TARGET, load_class
from zoo.train.run import fit
from zoo.train.run.trainer import TrainerConfig


def test_a_moved_class_is_resolved() -> None:
    assert load_class("trainer", "zoo.train.trainer.TrainerConfig") is TrainerConfig


def test_a_run_of_before_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit.run(config(), run) == 0
    shutil.rmtree(run / "checkpoint")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    for old, new in MOVED.items():
        text = text.replace(f"{new}.", f"{old}.")
    assert "zoo.train.trainer.TrainerConfig" in text
    (run / "config.yaml").write_text(text.replace("max_steps: 4", "max_steps: 6"), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RenamedWarning)
        assert read_run(run / "config.yaml")["trainer"][TARGET] == "zoo.train.run.trainer.TrainerConfig"
        assert fit.resume(run) == 0
    assert (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[-1].startswith("6,")
