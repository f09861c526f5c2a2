"""A sweep sorts its runs by what the metric itself says is better, a metric of a task of one's own included."""

import importlib
from pathlib import Path

import pytest

import zoo
from zoo.cli import sweep
from zoo.config import compose, to_yaml


def test_a_sweep_asks_the_metric_which_way_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    training = importlib.import_module("several_losses_training")
    zoo.allow_package(training.__name__)
    config = compose(["model=gla"]) | {"task": {"_target_": f"{training.__name__}.TinyTwo"}}
    runs = []
    for value in (-3.0, -1.0, -2.0):
        run = sweep.Run({"x": str(value)}, tmp_path / str(value))
        run.folder.mkdir()
        (run.folder / "config.yaml").write_text(to_yaml(config))
        (run.folder / "metrics.csv").write_text(f"step,val_certainty,val_accu\n1,{value},{value}\n")
        runs.append(run)

    def order(column: str) -> list[str]:
        return [row["x"] for row in sweep.collect(runs, {}, column)[0]]

    assert order("val_certainty") == ["-1.0", "-2.0", "-3.0"]
    assert order("val_accu") == ["-3.0", "-2.0", "-1.0"]
