"""Experiments of state tracking: with any causal model, and what a run says of each length."""

import csv
from pathlib import Path

import pytest

from zoo.config import compose
from zoo.registry import list_models
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate


@pytest.mark.parametrize("experiment", ["parity", "s5"])
@pytest.mark.parametrize("model", list_models(tags={"causal"}))
def test_an_experiment_composes_with_every_causal_model(experiment: str, model: str) -> None:
    config = compose([f"experiment={experiment}", f"model={model}"])
    assert config["model"]["name"] == model
    assert config["model"]["n_layers"] == 1
    assert config["data"]["min_len"] < config["data"]["seq_len"]


def test_a_run_gives_the_accuracy_at_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=parity", "model=deltanet", "data.val_lengths=[8,50]", "data.val_samples=40", "data.seq_len=8"]
    limits = ["trainer.max_steps=3", "trainer.val_every=3", "trainer.accelerator=cpu", "trainer.devices=1"]
    assert fit.run(compose([*words, *limits]), tmp_path / "run") == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert "last right@50" in capsys.readouterr().out
    for length in (8, 50):
        alone = evaluate(tmp_path / "run", ["data=parity", f"data.seq_len={length}", "data.val_samples=40"])
        for metric in ("accuracy", "sequence_accuracy", "last_accuracy"):
            assert float(last[f"val_{metric}_at_{length}"]) == pytest.approx(alone[metric], rel=1e-5)
    both = 8 * float(last["val_accuracy_at_8"]) + 50 * float(last["val_accuracy_at_50"])
    assert float(last["val_accuracy"]) == pytest.approx(both / 58, rel=1e-5)
