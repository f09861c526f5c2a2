"""The config of an earlier run names classes by where they were; it goes on, and says nothing nobody can mend."""

import shutil
import warnings
from pathlib import Path

import pytest
from tiny import config

from zoo import _deprecation
from zoo._deprecation import RenamedWarning
from zoo.config import compose, read_run
from zoo.configs import MOVED
from zoo.targets import TARGET, load_class
from zoo.train.run import fit

MOVES = [(group, old, new) for group, moved in MOVED.items() for old, new in moved.items()]


@pytest.fixture(autouse=True)
def no_warning_given_yet() -> None:
    _deprecation._warn.cache_clear()


@pytest.mark.parametrize(("group", "old", "new"), MOVES)
def test_a_moved_class_is_found_with_a_warning(group: str, old: str, new: str) -> None:
    with pytest.warns(RenamedWarning, match=f"{group}.{TARGET} '{old}' is called '{new}' now"):
        assert load_class(group, old) is load_class(group, new)
    _deprecation._warn.cache_clear()
    with pytest.warns(RenamedWarning, match=f"{group}.{TARGET} '{old}' is called '{new}' now"):
        assert compose([f"{group}.{TARGET}={old}"])[group][TARGET] == new


def test_a_run_of_before_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit.run(config(), run) == 0
    shutil.rmtree(run / "checkpoint")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    for _, old, new in MOVES:
        text = text.replace(new, old)
    assert "zoo.train.trainer.TrainerConfig" in text
    (run / "config.yaml").write_text(text.replace("max_steps: 4", "max_steps: 6"), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RenamedWarning)
        assert read_run(run / "config.yaml")["trainer"][TARGET] == "zoo.train.run.trainer.TrainerConfig"
        assert fit.resume(run) == 0
    assert (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[-1].startswith("6,")
