"""Runs that break: weights that are not finite, damaged folders, a closed terminal, settings out of range."""

import contextlib
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import Tiny, TinyData, config

import zoo
from zoo import cli, decoding
from zoo.errors import UsageError, UserError
from zoo.tokenizers import ByteTokenizer
from zoo.train.data.text.text_files import TextFiles
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.run.interrupt import Interrupts
from zoo.train.tasks.language_modelling import LanguageModelling

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert fit.run(config(trainer__max_steps=2), run) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run with a checkpoint that can go on."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoint")
    return copy


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """What a command ends with and its one sentence."""
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert captured.err.startswith("zoo: "), captured.out + captured.err
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err


# -- weights that are not finite ---------------------------------------------------------------------------------


def test_a_learning_rate_that_breaks_the_weights_ends_the_run(tmp_path: Path) -> None:
    """A rate of 3e38 makes the first weights infinite; before any checkpoint there is none to keep."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"weights are not finite after step 2; lower optim\.lr"):
        fit.run(config(optim__lr=3e38, optim__warmup_steps=0, optim__weight_decay=10.0), run)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    assert not (run / "checkpoint").exists()
    assert "error: the model's weights are not finite" in (run / "log.txt").read_text()


def test_the_last_finite_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight becomes NaN behind the back of the loss, as a broken kernel or a bad clipping would have it."""
    batch = TinyData.batch

    def spoil(self: TinyData, epoch: int, index: int, *ranks: int) -> dict[str, Any]:
        if (epoch, index) == (0, 3):
            models[-1].mix.bias.data[0] = math.nan
        return batch(self, epoch, index, *ranks)

    models: list[Tiny] = []
    make = Tiny.__init__
    monkeypatch.setattr(Tiny, "__init__", lambda self, cfg: (make(self, cfg), models.append(self))[0])
    monkeypatch.setattr(TinyData, "batch", spoil)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="weights are not finite after step 4") as refused:
        fit.run(config(trainer__max_steps=6, trainer__val_every=50), run)
    assert "\n" not in str(refused.value)
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    assert not (run / "checkpoint").exists()
    assert zoo.load(run).name == "tiny-test"


def test_large_weights_are_finite_though_their_sum_is_not() -> None:
    model = zoo.create_model("tiny-test")
    task = LanguageModelling(model, AdamW(), Limits(), TinyData())
    assert task.weights_are_finite()
    model.mix.weight.data.fill_(3e38)
    assert not model.mix.weight.sum().isfinite()
    assert task.weights_are_finite()
    for broken in (math.nan, math.inf, -math.inf):
        model.mix.weight.data[0, 0] = broken
        assert not task.weights_are_finite()


@pytest.mark.parametrize("lr", [1e30, 1e10])
def test_a_short_run_that_diverged_is_a_failure(tmp_path: Path, lr: float) -> None:
    """Its weights may still be numbers; nothing that is computed from them is."""
    run = tmp_path / "run"
    settings = config(optim__lr=lr, optim__warmup_steps=0, trainer__max_steps=3, trainer__log_every=5)
    with pytest.raises(UserError, match="not finite"):
        fit.run(settings, run)
    assert not (run / "checkpoint").exists()


def test_a_short_run_whose_steps_were_skipped_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of 1e30 are finite, and so is the loss, since a norm of them is zero; their gradients are not."""
    code, sentence = said(
        capsys, "train", "model=gla", "model.d_model=16", "model.n_layers=1", "data=parity", "optim.lr=1e30",
        "optim.warmup_steps=1", "trainer.max_steps=5", "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 1
    assert "the loss or its gradient in the last 4 of 5 steps being not finite; lower optim.lr" in sentence
    assert not (tmp_path / "run" / "checkpoint").exists()
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_eval_refuses_weights_that_are_not_finite(
    value: float, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    weights = run / "checkpoint" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "mix.weight": tensors["mix.weight"] + value}, weights, metadata={"format": "pt"})
    code, sentence = said(capsys, "eval", run)
    assert (code, "its weights are broken or its training diverged" in sentence) == (1, True), sentence
    assert f"the model in {run / 'checkpoint'} is nan" in sentence


def test_generate_refuses_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = zoo.create_model("gla", d_model=16, n_layers=1, n_heads=1, hidden_size=16, vocab_size=257)
    zoo.save(model, tmp_path / "model", ByteTokenizer())
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "norm" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], math.nan)}, weights, metadata={"format": "pt"})
    for temperature in ("0", "1"):
        code, sentence = said(capsys, "generate", tmp_path / "model", "--temperature", temperature)
        assert (code, "its weights are broken or its training diverged" in sentence) == (1, True), sentence


def test_a_token_that_cannot_come_is_no_broken_score() -> None:
    """Minus infinity is an answer; NaN and infinity are none."""
    model = zoo.create_model("gla", d_model=16, n_layers=1, n_heads=1, hidden_size=16, vocab_size=5).eval()
    scores = torch.tensor([0.0, -math.inf, 0.0, -math.inf, -math.inf])
    model.head = lambda hidden: scores.expand(*hidden.shape[:-1], 5)  # type: ignore[assignment]
    assert set(decoding.generate(model, [0], max_tokens=8, seed=0)) <= {0, 2}  # type: ignore[arg-type]
    for broken in (math.nan, math.inf):
        scores[1] = broken
        with pytest.raises(UserError, match="are not numbers"):
            list(decoding.generate(model, [0], max_tokens=1))  # type: ignore[arg-type]


# -- damaged folders ---------------------------------------------------------------------------------------------


def edited(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    edit(settings)
    path.write_text(yaml.safe_dump(settings))


def state(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


LAST = "checkpoints/last.ckpt"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty checkpoint": (lambda run: cut(run / LAST, 0), "last.ckpt is damaged or cut short; take another copy, or "
                         "copy best.ckpt over it, or start a new run"),
    "checkpoint cut": (lambda run: cut(run / LAST, 2000), "last.ckpt is damaged or cut short ("),
    "checkpoint of text": (lambda run: (run / LAST).write_text("hello world"), "last.ckpt is damaged or cut short ("),
    "checkpoint of zeros": (lambda run: (run / LAST).write_bytes(bytes(5000)), "last.ckpt is damaged or cut short;"),
    "no state": (lambda run: torch.save([1], run / LAST), "it has no state_dict of tensors"),
    "state without loops": (lambda run: state(run, lambda s: s.pop("loops")), "it has no loops; copy best.ckpt"),
    "state without ours": (lambda run: state(run, lambda s: s.pop("zoo")), "it has no zoo; copy best.ckpt"),
    "empty config": (lambda run: cut(run / "config.yaml", 0), "config.yaml is empty; put the run's own config.yaml "
                     "back, or start a new run with the command in "),
    "config cut": (lambda run: cut(run / "config.yaml", 60), "config.yaml is not a config: "),
    "config of two lines": (lambda run: (run / "config.yaml").write_text("seed: 0\nrun_dir: x\n"),
                            "is not the config of a run: it has no model, data, task, optim, trainer; put"),
    "config no YAML": (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml is not a config: "),
    "config a number": (lambda run: (run / "config.yaml").write_text("3"), "config.yaml is not a config: "),
    "config bytes": (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml is not a config: "),
    "config knotted": (lambda run: (run / "config.yaml").write_text("a: &a [*a]"), "config.yaml is not a config: "),
    "no data": (lambda run: edited(run, lambda c: c.pop("data")), "it has no data; put"),
    "no seed": (lambda run: edited(run, lambda c: c.pop("seed")), "it has no seed; put"),
    "no target": (lambda run: edited(run, lambda c: c["task"].pop("_target_")), "it has no task; put"),
    "half a section": (lambda run: edited(run, lambda c: c["optim"].pop("_target_")), "it has no optim._target_; put"),
    "data a word": (lambda run: edited(run, lambda c: c.update(data="parity")), "data must be a group of settings"),
    "an odd key": (lambda run: edited(run, lambda c: c["data"].update({7: 1})), "no setting 'data.7'"),
    "a wrong key": (lambda run: edited(run, lambda c: c["optim"].update(lrr=1)), "did you mean 'optim.lr'?"),
    "a wrong type": (lambda run: edited(run, lambda c: c["optim"].update(lr="fast")), "optim.lr must be float"),
    "out of range": (lambda run: edited(run, lambda c: c["optim"].update(lr=-1.0)), "optim.lr must be above 0"),
    "another model": (lambda run: edited(run, lambda c: c["model"].update(name="nosuch")), "no model 'nosuch'"),
    "another width": (lambda run: edited(run, lambda c: c["model"].update(d_model=16)),
                      "config.yaml says model.d_model=16 and its checkpoint was trained with 8; put the run's own"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_sentence_that_says_what_to_do(
    damage: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, sentence = DAMAGES[damage]
    shutil.copy(run / LAST, run / "checkpoints" / "best.ckpt")
    apply(run)
    code, got = said(capsys, "resume", run)
    assert (code, sentence in got) == (1, True), got
    assert "weights_only" not in got


def test_resume_names_a_file_for_what_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, sentence = said(capsys, "resume", run / LAST)
    assert (code, sentence) == (1, f"zoo: a run is a folder, and {run / LAST} is a file; zoo resume {run}\n")
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file; zoo train prints the folder" in said(capsys, "resume", tmp_path / "notes.txt")[1]


def test_an_evaluation_by_another_task_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, sentence = said(capsys, "eval", finished, "data=digits", "task=classification")
    assert code == 2
    assert "trained for, LanguageModelling, and task=classification asks for another" in sentence
    code, sentence = said(capsys, "eval", finished, "data=digits", "model.d_model=3")
    assert (code, "no setting 'model.d_model' for an evaluation" in sentence) == (2, True)
    assert said(capsys, "eval", finished, "data.batch_size=many")[0] == 2
    assert evaluate(finished, ["task=language_modelling"]) == evaluate(finished)


# -- a closed terminal -------------------------------------------------------------------------------------------


def wait_for(path: Path, text: str, child: subprocess.Popen[bytes], terminal: int) -> None:
    """Until a file holds a text; what the child writes to its terminal is read, for a full terminal would stop it."""
    deadline = time.monotonic() + 240
    while not (path.is_file() and text in path.read_text()):
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
        assert child.poll() is None
        assert time.monotonic() < deadline, path.read_text() if path.is_file() else "nothing yet"
        time.sleep(0.05)


def test_closing_the_terminal_saves_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(trainer__max_steps=1_000_000, trainer__val_every=100_000, trainer__checkpoint_every=100_000)
    terminal, inner = pty.openpty()
    program = f"import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.path.insert(0, {str(HERE)!r}); "
    program += f"from zoo.train.run import fit; import tiny; sys.exit(fit.run({settings!r}, {str(run)!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(inner)
    try:
        os.set_blocking(terminal, False)
        wait_for(run / "log.txt", "step 3 ", child, terminal)
        os.close(terminal)
        assert child.wait(timeout=120) == 130
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    assert f"interrupted; zoo resume {run} goes on from here" in (run / "log.txt").read_text()
    assert torch.load(run / LAST, weights_only=True)["global_step"] >= 3


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# -- settings out of range ---------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    "optim.lr=0", "optim.lr=inf", "optim.lr=nan", "optim.lr=-1", "optim.betas=[1.0,0.9]", "optim.betas=[0.9,-0.1]",
    "optim.eps=-1.0", "optim.eps=nan", "optim.weight_decay=-0.1", "optim.weight_decay=inf", "optim.warmup_steps=-1",
    "optim.min_lr_ratio=2.0", "trainer.gradient_clip_val=nan", "trainer.gradient_clip_val=-1.0",
    "trainer.gradient_clip_algorithm=value", "trainer.max_steps=0", "trainer.max_time='soon'", "trainer.log_every=0",
    "trainer.val_every=0", "trainer.checkpoint_every=-1", "trainer.sample_every=-1", "trainer.max_epochs=0",
    "trainer.accumulate_grad_batches=0", "trainer.num_nodes=0", "trainer.precision='16-mixed'",
    "trainer.limit_val_batches=-1", "trainer.limit_val_batches=1.5", "trainer.fast_dev_run=-1",
    "trainer.precision='12'", "trainer.accelerator=abacus", "trainer.devices=0", "trainer.profiler=crystal",
    "memory.recompute=often", "memory.budget=some", "task.max_nonfinite_steps=0",
    "data.batch_size=0", "data.num_workers=-1", "data.seq_len=0", "data.seed=-1",
    "data.min_len=99999", "data.labels=some", "data.val_lengths=[0]",
]  # fmt: skip


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_exit_code_2_and_leaves_nothing(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, sentence = said(
        capsys, "train", "model=gla", "model.d_model=16", "model.n_layers=1", "data=parity", "trainer.max_steps=1",
        "trainer.accelerator=cpu", "run_dir=runs/new", setting,
    )  # fmt: skip
    assert code == 2, sentence
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_refused_after_its_folder_was_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TinyData) -> Any:
        raise UserError("no data after all")

    monkeypatch.setattr(TinyData, "train_dataloader", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no data after all"):
        fit.run(config(), "runs/new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data after all"):
        fit.run(config(), "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_settings_of_a_folder_are_no_words_of_the_command(run: Path) -> None:
    edited(run, lambda settings: settings["data"].update(batch_size=4, metrics=["accuracy"]))
    edited(run, lambda settings: settings["trainer"].update(accelerator="abacus"))
    with pytest.raises(UserError, match=r"cannot go on with the settings in its config\.yaml") as refused:
        fit.resume(run)
    assert not isinstance(refused.value, UsageError)


# -- text as others write it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_mark_is_read_by_it(tmp_path: Path, encoding: str) -> None:
    text = "naïve café 漢字 " * 10
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert [document.text for document in TextFiles(path=str(tmp_path)).documents()] == [text]


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-32-le"])
def test_text_of_zero_bytes_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("plain words, " * 10).encode(encoding))
    with pytest.raises(UserError, match=r"must be UTF-8; .*a\.txt.*zero bytes.*iconv -f utf-16le"):
        TextFiles(path=str(tmp_path)).documents()


def test_broken_utf16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"\x00\xd8")
    with pytest.raises(UserError, match=r"must be UTF-8; .*a\.txt"):
        TextFiles(path=str(tmp_path)).documents()


def test_nothing_of_other_libraries_stands_before_the_sentence(tmp_path: Path) -> None:
    """In a process of its own, since they read how much to say when they are imported."""
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    words = [sys.executable, "-m", "zoo", "train", "model=gla", "data=text_files", f"data.path={tmp_path}/bad.parquet"]
    done = subprocess.run(
        [*words, f"run_dir={tmp_path}/run"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("zoo: a .parquet file must be readable by pyarrow; "), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
