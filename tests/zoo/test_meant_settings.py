"""Settings that a user nearly meant: one sentence says what to write, exit code 2, and nothing is left behind."""

import subprocess
from pathlib import Path

import pytest

from zoo import cli, config
from zoo.cli.completion import bash, settings_words
from zoo.configs import ROOT

LONG = "a" * 300


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """words -> what `zoo train` says of them; it ends with code 2 and makes no file."""

    def said(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["train", *words]) == cli.USAGE
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return err.removeprefix("zoo: ").rstrip()

    return said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("lr=1e-3", "no setting 'lr'; did you mean optim.lr=? zoo config prints all settings"),
        ("max_steps=3", "no setting 'max_steps'; did you mean trainer.max_steps=? "),
        ("size=340m", "no setting 'size'; did you mean model.size=? "),
        ("n_heads=2", "no setting 'n_heads'; did you mean model.n_heads=? "),
        ("vocab_size=300", "no setting 'vocab_size'; did you mean model.vocab_size= or data.vocab_size=? "),
        ("optim.max_steps=3", "no setting 'optim.max_steps'; did you mean trainer.max_steps=? "),
        ("--model=deltanet", "zoo train takes settings without dashes; write model=deltanet, not --model"),
        ("--optim.lr=1", "zoo train takes settings without dashes; write optim.lr=1, not --optim.lr"),
        ("~optim", "a config needs optim; add optim=NAME, zoo config --groups lists them"),
        ("~trainer", "a config needs trainer; add trainer=NAME, "),
        (f"seed={2**70}", f"seed must be in [0, 2**63 - 1], got {2**70}"),
        ("seed=-1", "seed must be in [0, 2**63 - 1], got -1"),
        (f"run_dir={LONG}", "the names in run_dir must have at most 255 bytes each, got one of 300"),
        (f"run_dir='runs/{'ü' * 128}/x'", "the names in run_dir must have at most 255 bytes each, got one of 256"),
        ("trainer.devices=9999", "trainer.devices counts processes on a CPU and may be at most 8 for each core, "),
        ("model.pattern='attention(windw=64)'",
         "model 'deltanet': the mixer 'attention' of a pattern has no option 'windw'; did you mean 'window'? it has"),
        ("model.pattern='attention(window=abc)'",
         "model 'deltanet': the mixer 'attention' of a pattern does not take (window='abc'): "),
        ("model.pattern='attention(n_heads=0)'", "model 'deltanet': Attention: heads must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_what_was_meant_is_said(refusal, monkeypatch: pytest.MonkeyPatch, word: str, sentence: str) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert refusal(word)[: len(sentence)] == sentence


def test_an_option_and_its_value_are_a_setting(refusal) -> None:
    assert refusal("--model", "gla") == "zoo train takes settings without dashes; write model=gla, not --model"


def test_an_option_that_is_nearly_one_stays_an_option(refusal) -> None:
    assert (
        refusal("--metrc=x")
        == "zoo train has no option '--metrc'; did you mean '--metric'? zoo train --help lists them"
    )


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard or tensorboardX")])
def test_a_logger_without_its_package_names_the_extra(
    refusal, monkeypatch: pytest.MonkeyPatch, logger: str, package: str
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert refusal(f"logger={logger}") == (
        f"logger={logger} needs the package {package}, which is not installed; pip install 'seqzoo[{logger}]'"
    )
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8").partition("optional-dep")[2]
    assert f"\n{logger} = [" in extras


def test_a_logger_with_its_package_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: name)
    section = config.compose(["logger=tensorboard"])["logger"]
    assert section["_target_"] == "lightning.pytorch.loggers.TensorBoardLogger"
    assert config.REQUIRES not in section


def test_completion_knows_the_settings_of_every_group() -> None:
    words = settings_words()
    assert {"optim.lr=", "trainer.max_steps=", "data.batch_size=", "task.max_nonfinite_steps=", "model.n_heads="} <= {
        *words
    }
    for path in ROOT.glob("*/*.json"):
        assert any(word.startswith(f"{path.parent.name}.") for word in words)


def test_the_shell_completes_a_key() -> None:
    script = bash() + 'COMP_LINE="zoo train optim.l"; COMP_POINT=17; COMP_CWORD=2; COMP_WORDS=(zoo train optim.l)\n'
    done = subprocess.run(
        ["bash", "-c", script + '_zoo 2> /dev/null; echo "${COMPREPLY[@]}"'],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["optim.lr="]
