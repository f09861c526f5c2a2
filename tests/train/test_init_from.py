"""init_from: a run that starts from the weights of another, all of them or none."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from tiny import config

import zoo
from zoo.cli import main
from zoo.config import compose, read_run
from zoo.errors import UserError
from zoo.train.run import fit


class Beginning(Callback):
    """The weights before the first step, and whether the optimiser was fresh."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.model
        assert isinstance(model, torch.nn.Module)
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.fresh = not trainer.optimizers[0].state
        self.step = trainer.global_step


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    assert fit.run(config(), run) == 0
    return run


@pytest.mark.parametrize("place", [".", "checkpoint", "checkpoints/last.ckpt"])
def test_a_run_starts_from_the_weights_with_a_fresh_optimiser(place: str, trained: Path, tmp_path: Path) -> None:
    first = Beginning()
    assert (
        fit.run(config(init_from=str(trained / place), trainer__max_steps=2), tmp_path / "run", callbacks=[first]) == 0
    )
    want = load_file(trained / "checkpoint" / "model.safetensors")
    assert first.weights.keys() <= want.keys()
    assert all(torch.equal(weight, want[name]) for name, weight in first.weights.items())
    assert (first.fresh, first.step) == (True, 0)
    assert f"from the weights of {trained / place}" in (tmp_path / "run" / "log.txt").read_text()


def test_loading_draws_nothing(trained: Path, tmp_path: Path) -> None:
    """The second run's draws are those of a run without init_from: dropout by the same masks."""
    drawn = {}
    for name, origin in (("with", str(trained)), ("without", None)):
        noted: list[torch.Tensor] = []

        class Draw(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                noted.append(torch.get_rng_state())  # noqa: B023 - called inside the loop

        fit.run(config(init_from=origin, trainer__max_steps=1), tmp_path / name, callbacks=[Draw()])
        drawn[name] = noted[0]
    assert torch.equal(drawn["with"], drawn["without"])


def test_every_difference_is_named_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    other = config(init_from=str(trained), model__d_model=12)
    with pytest.raises(UserError) as refusal:
        fit.run(other, tmp_path / "run")
    text = str(refusal.value)
    stored = load_file(trained / "checkpoint" / "model.safetensors")
    assert all(
        f"{name} {tuple(tensor.shape)} instead of" in text for name, tensor in stored.items() if 8 in tensor.shape
    )
    assert text.endswith("it was made with model.d_model=8, train such a model or give other weights")
    assert "\n" not in text
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    zoo.save(zoo.create_model("gla", d_model=8, n_layers=1, hidden_size=8, vocab_size=11), tmp_path / "gla")
    with pytest.raises(
        UserError, match=r"it lacks .*; it has besides .*; it is a gla, train model=gla or give weights"
    ):
        fit.run(config(init_from=str(tmp_path / "gla")), tmp_path / "run")


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        fit.run(config(init_from=str(tmp_path / "nothing")), tmp_path / "run")


def test_a_resumed_run_takes_its_own_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Not the weights that it once started from; and resume takes no init_from."""

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    settings = config(init_from=str(trained))
    assert fit.run(settings, tmp_path / "whole") == 0
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit.run(settings, tmp_path / "cut", callbacks=[Stop()])
    assert fit.resume(tmp_path / "cut") == 0
    ends = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert main(["resume", str(tmp_path / "cut"), f"init_from={trained}"]) == 2


def test_the_config_keeps_a_path_that_holds_from_anywhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    assert fit.run(config(init_from=trained.name, trainer__max_steps=1), tmp_path / "run") == 0
    assert read_run(tmp_path / "run" / "config.yaml")["init_from"] == str(trained.resolve())


def test_the_key_is_a_setting_of_every_run() -> None:
    assert compose([])["init_from"] is None
    assert compose(["init_from=runs/first"])["init_from"] == "runs/first"
