"""zoo bench, profile, show and eval of what is no language model: by the task's own losses and in its own units."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo import cli
from zoo.bench import steps
from zoo.bench.models import check_request, run_model
from zoo.bench.profile import profile_model
from zoo.bench.record import STEP, Record
from zoo.bench.report import markdown
from zoo.bench.steps import ModelRequest
from zoo.config import compose
from zoo.errors import UserError
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate

CPU = ["trainer.accelerator=cpu", "model.n_layers=1"]
QUIET: Any = lambda said: None


def request(*words: str, **groups: Any) -> ModelRequest:
    return ModelRequest(compose([*words, *CPU]) | groups, steps=1, repeats=1)


def of_two_losses(monkeypatch: pytest.MonkeyPatch, task: str = "TwoLosses") -> ModelRequest:
    """A model of text whose task has two losses, and data without a word of their own for zoo."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    name = importlib.import_module("several_losses_training").__name__
    zoo.allow_package(name)
    words = ("model=gla", "model.vocab_size=13", "model.d_model=16", "model.n_heads=2")
    return request(*words, task={"_target_": f"{name}.{task}"}, data={"_target_": f"{name}.Data"})


def speed(record: Record) -> tuple[str, float]:
    """The heading of the throughput, and units a step."""
    assert not record.is_red
    headings = [cell.strip() for cell in markdown(record).split("|") if cell.strip().endswith("s/s")]
    return headings[0], record.cases[0].sides[0].phases[STEP].tokens


def test_pictures_are_counted_as_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    asked = request("model=vit", "data.batch_size=8")
    record = run_model(asked, QUIET)
    assert speed(record) == ("images/s", 8)
    assert "agree with the same model in float64 on one image" in markdown(record)
    table = profile_model(asked, tmp_path / "trace.json").markdown()
    assert "vit: one training step of 8 images, " in table
    assert " images/s, time by" in table


def test_pairs_of_sequences_are_counted_as_tokens_of_both(tmp_path: Path) -> None:
    asked = request("model=encoder_decoder", "model.n_encoder_layers=1", "data.batch_size=8")
    assert speed(run_model(asked, QUIET)) == ("tokens/s", 8 * (16 + 17))
    assert "of 264 tokens, " in profile_model(asked, tmp_path / "trace.json").markdown()


def test_a_task_is_measured_by_its_own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = of_two_losses(monkeypatch)
    record = run_model(asked, QUIET)
    assert speed(record) == ("tokens/s", 6 * 16)
    assert "bare loop, lightning agree with the same model in float64 on one row of 16 tokens" in markdown(record)
    assert "loss, backward" in profile_model(asked, tmp_path / "trace.json").markdown()


def test_a_bare_loop_with_another_loss_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.own_losses
    monkeypatch.setattr(steps, "own_losses", lambda *args: 1.01 * right(*args))
    record = run_model(of_two_losses(monkeypatch), QUIET)
    assert record.is_red
    assert "**RED**" in markdown(record)


def test_what_cannot_be_measured_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"or by a task's losses_of, and MaskedLanguageModelling \(model=hydra\) has"):
        check_request(request("model=hydra"))
    check_request(request("model=hydra", "task=classification", "data=digits"))


def test_show_says_at_which_length_where_there_is_time(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("vit", "FLOPs per image: "), ("encoder_decoder", "FLOPs per token at T = 1024: ")):
        assert cli.main(["show", name]) == 0
        assert said in capsys.readouterr().out


def test_a_bare_checkpoint_of_pictures_is_measured_by_its_own_task(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = ["model=vit", *CPU, "trainer.max_steps=2", "trainer.limit_val_batches=2"]
    assert fit.run(compose(words), tmp_path / "run") == 0
    shutil.copytree(tmp_path / "run" / "checkpoint", tmp_path / "alone")
    same = ["trainer.limit_val_batches=2", "trainer.accelerator=cpu"]
    assert evaluate(tmp_path / "alone", same) == evaluate(tmp_path / "run", same)


@pytest.mark.parametrize("name", ["vit", "encoder_decoder"])
def test_automatic_memory_plans_or_says_why_not(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model={name}", *CPU, "memory=auto", "trainer.max_steps=1", "trainer.limit_val_batches=1"]
    code = cli.main(["train", *words, f"run_dir={tmp_path / name}"])
    out, err = capsys.readouterr()
    if name == "vit":
        assert code == 0
        assert "memory" in out
    else:
        assert code == 1
        assert err.startswith("zoo: ")
        assert err.count("\n") == 1
        assert "memory.recompute=block" in err
