"""ema: the average of the weights is the one that the docstring gives, validated, saved, and resumed exactly."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from test_strategies_runs import launch, rows
from test_strategies_runs import settings as sharded_settings
from tiny import config

import zoo
from zoo.config import compose
from zoo.errors import UsageError
from zoo.train.callbacks.average import AverageWeights
from zoo.train.evaluate import evaluate
from zoo.train.run import fit

DECAY = 0.9


class Noted(Callback):
    """The weights after every update, and those that a validation sees."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after.append(weights(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.validated.append(weights(pl_module))


def weights(module: LightningModule) -> dict[str, torch.Tensor]:
    model = module.model
    assert isinstance(model, torch.nn.Module)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def average(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The definition, a weighted sum over all updates, in float64."""
    n = len(steps)
    shares = [(1 - DECAY) * DECAY ** (n - 1 - k) / (1 - DECAY**n) for k in range(n)]
    assert abs(sum(shares) - 1) < 1e-12
    return {name: sum(s * w[name].double() for s, w in zip(shares, steps, strict=True)) for name in steps[0]}


def saved(run: Path, folder: str) -> dict[str, torch.Tensor]:
    return load_file(run / folder / "model.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_what_it_says(accumulate: int, tmp_path: Path) -> None:
    noted = Noted()
    settings = config(ema=DECAY, optim__lr=0.1, trainer__max_steps=6, trainer__accumulate_grad_batches=accumulate)
    assert fit.run(settings, tmp_path / "run", callbacks=[noted]) == 0
    assert len(noted.after) == 6
    want = average(noted.after)
    ours, last = saved(tmp_path / "run", "checkpoint_ema"), saved(tmp_path / "run", "checkpoint")
    for name, exact in want.items():
        torch.testing.assert_close(ours[name].double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(last[name], noted.after[-1][name])
        assert not torch.allclose(ours[name], last[name], rtol=1e-3, atol=1e-4), "a negative control"


def test_validation_measures_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    noted, plain = Noted(), Noted()
    settings = config(optim__lr=0.1, trainer__max_steps=6)
    assert fit.run({**settings, "ema": DECAY}, tmp_path / "run", callbacks=[noted]) == 0
    assert fit.run(settings, tmp_path / "plain", callbacks=[plain]) == 0
    for ours, want in zip(noted.after, plain.after, strict=True):
        assert all(torch.equal(ours[name], want[name]) for name in want)
    for name, exact in average(noted.after[:3]).items():
        torch.testing.assert_close(noted.validated[0][name].double(), exact, rtol=1e-5, atol=1e-6)
    final = last_row(tmp_path / "run")["val_loss"]
    assert evaluate(tmp_path / "run" / "checkpoint_ema")["loss"] == pytest.approx(float(final), rel=1e-5)
    assert evaluate(tmp_path / "run")["loss"] != pytest.approx(float(final), rel=1e-3)
    assert not (tmp_path / "plain" / "checkpoint_ema").exists()


def last_row(run: Path) -> dict[str, str]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def test_a_resumed_run_has_the_same_average(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    settings = config(ema=DECAY, optim__lr=0.1, trainer__max_steps=8, model__dropout=0.3)
    assert fit.run(settings, tmp_path / "whole") == 0
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit.run(settings, tmp_path / "cut", callbacks=[Stop()])
    assert fit.resume(tmp_path / "cut") == 0
    for folder in ("checkpoint", "checkpoint_ema"):
        ours, want = saved(tmp_path / "cut", folder), saved(tmp_path / "whole", folder)
        assert all(torch.equal(ours[name], want[name]) for name in want)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_half_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    noted = Noted()
    settings = config(ema=0.99, trainer__precision="bf16-true", optim__lr=0.1)
    assert fit.run(settings, tmp_path / "run", callbacks=[noted]) == 0
    assert noted.after[0]["embedding.weight"].dtype == torch.bfloat16
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = [value for key, value in state.items() if key.startswith(AverageWeights.__name__)]
    assert kept["updates"] == 4
    assert {x.dtype for x in kept["average"].values()} == {torch.float32}


def test_a_decay_outside_its_range_is_refused() -> None:
    for decay in ("0", "1", "-0.5", "1.5"):
        with pytest.raises(UsageError, match=r"ema must be in \(0, 1\)"):
            compose([f"ema={decay}"])
    assert compose(["ema=0.999"])["ema"] == 0.999
    assert compose([])["ema"] is None


@pytest.mark.everything
@pytest.mark.parametrize("strategy", ["ContextParallelStrategy", "ContextParallelFSDPStrategy"])
def test_the_average_of_cut_time_and_cut_weights_is_that_of_one_process(strategy: str, tmp_path: Path) -> None:
    made = {**sharded_settings(strategy), "ema": DECAY}
    alone = {**made, "strategy": {}, "trainer": {**made["trainer"], "devices": 1}}
    for name, each in (("cut", made), ("alone", alone)):
        done = launch(tmp_path / name, each)
        assert done.returncode == 0, done.stdout + done.stderr
    want = saved(tmp_path / "alone", "checkpoint_ema")
    for name, tensor in saved(tmp_path / "cut", "checkpoint_ema").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-5)
    ours, theirs = float(last_row(tmp_path / "cut")["val_loss"]), float(last_row(tmp_path / "alone")["val_loss"])
    assert ours == pytest.approx(theirs, rel=1e-4)
    stopped = launch(tmp_path / "stopped", made, "2 5 1")
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert launch(tmp_path / "stopped", None).returncode == 0
    for name, tensor in saved(tmp_path / "stopped", "checkpoint_ema").items():
        assert torch.equal(tensor, saved(tmp_path / "cut", "checkpoint_ema")[name])
    zoo.load(tmp_path / "cut" / "checkpoint_ema")
