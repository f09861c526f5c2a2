"""Policies on data=reaching: a run trains, resumes to the same losses, keeps its codec, is evaluated and shown."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import zoo
from zoo import checkpoint, codecs
from zoo.config import compose
from zoo.errors import UserError
from zoo.layers.policy import Policy
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate

SMALL = (
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "data.episodes=10", "data.val_episodes=1",
    "data.batch_size=16", "task.trials=4", "trainer.accelerator=cpu", "trainer.sample_every=0",
)  # fmt: skip


def losses(run: Path) -> dict[int, str]:
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]
    step, loss = rows[0].index("step"), rows[0].index("loss")
    return {int(row[step]): row[loss] for row in rows[1:] if row[loss]}


@pytest.mark.parametrize(
    ("words", "slots"),
    [
        (("model=beast", "data.n_controls=6"), 18),
        pytest.param(("model=autoregressive_policy", "data.codec=bins"), 60, marks=pytest.mark.everything),
    ],
)
def test_a_policy_trains_resumes_and_keeps_its_codec(
    words: tuple[str, ...], slots: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("trainer.max_steps=4", "trainer.log_every=1", "trainer.val_every=2")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    assert fit.run(compose([*words, *SMALL, *more]), whole) == 0
    assert "of 8 episodes succeeded" in capsys.readouterr().out
    assert (whole / "robot.gif").read_bytes().startswith(b"GIF89a")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit.run(compose([*words, *SMALL, *more]), stopped, callbacks=[Stop()])
    assert fit.resume(stopped) == 0
    assert losses(stopped) == losses(whole)
    assert sorted(losses(whole)) == [1, 2, 3, 4]
    model = zoo.load(whole)
    assert isinstance(model, Policy)
    assert model.n_slots == slots
    own = codecs.load(checkpoint.locate(whole))
    before = own.encode([torch.linspace(0, 1, 20)[:, None].expand(-1, 3)]).ids
    assert before.numel() == slots
    measured = evaluate(whole)
    # other demonstrations, and no run beside the checkpoint: the codec is the one of the training all the same
    alone = tmp_path / "alone"
    zoo.save(model, alone, codec=own)
    again = evaluate(alone, ["data.val_episodes=1", "data.episodes=3"])
    assert measured.keys() == again.keys()
    assert measured["loss"] == pytest.approx(again["loss"], rel=1e-5)
    with pytest.raises(UserError, match="n_slots"):
        evaluate(alone, ["data.codec=bspline", "data.n_controls=4", "data.degree=3", "data.episodes=3"])
    capsys.readouterr()


@pytest.mark.everything
@pytest.mark.timeout(900)
def test_beast_learns_to_grasp(tmp_path: Path) -> None:
    """As on its card, in fewer updates: far above what a robot that does nothing reaches."""
    words = ("model=beast", "trainer.max_steps=700", "trainer.val_every=700", "trainer.sample_every=0", "seed=0")
    assert fit.run(compose([*words, "trainer.accelerator=cpu"]), tmp_path / "run") == 0
    measured = evaluate(tmp_path / "run")
    assert measured["success_rate"] > 0.4
    assert measured["malformed_chunks"] == 0
