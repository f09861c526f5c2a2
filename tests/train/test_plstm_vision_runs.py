"""plstm_vision on digits and on arrows: a run trains, shows, resumes to the same losses, and is evaluated."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer

import zoo
from zoo.config import compose
from zoo.models.plstm_vision import PLSTMVision
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate

SMALL = ("model=plstm_vision", "model.n_layers=2", "model.d_model=32", "model.n_heads=2", "trainer.accelerator=cpu")
ARROWS = (
    "data=arrow_pointing", "data.image_size=64", "data.object_scale=0.33", "data.batch_size=16", "data.val_samples=40",
    "data.train_samples=200", "model.image_size=64", "model.patch_size=16", "model.channels=3",
)  # fmt: skip


def losses(run: Path) -> dict[int, str]:
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]
    step, loss = rows[0].index("step"), rows[0].index("loss")
    return {int(row[step]): row[loss] for row in rows[1:] if row[loss]}


@pytest.mark.everything
def test_digits_are_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    more = ("trainer.max_steps=80", "trainer.val_every=80", "trainer.sample_every=50", "optim.lr=5e-3")
    assert fit.run(compose([*SMALL, *more]), tmp_path / "run") == 0
    assert "pictures at step 50: " in capsys.readouterr().out
    assert (tmp_path / "run" / "pictures.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate(tmp_path / "run")["accuracy"] > 0.4, "guessing gives 0.1"


def test_arrows_train_resume_and_are_evaluated_at_another_size(tmp_path: Path) -> None:
    more = ("trainer.max_steps=6", "trainer.log_every=1", "trainer.val_every=3")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    assert fit.run(compose([*SMALL, *ARROWS, *more]), whole) == 0
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit.run(compose([*SMALL, *ARROWS, *more]), stopped, callbacks=[Stop()])
    assert sorted(losses(stopped)) == [1, 2, 3, 4]
    assert fit.resume(stopped) == 0
    assert losses(stopped) == losses(whole)
    assert isinstance(zoo.load(whole), PLSTMVision)
    for size in (64, 96):
        assert 0 <= evaluate(whole, [f"data.image_size={size}"])["accuracy"] <= 1
