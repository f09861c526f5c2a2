"""Checkpoints: the same model back, and the old one kept when a new one cannot be written."""

import json
import re
import resource
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import zoo
from zoo import checkpoint
from zoo.errors import UserError


class Words:
    """A tokenizer, as far as a checkpoint knows."""

    def __init__(self, *files):
        self.files = files

    def save(self, folder):
        for name in self.files:
            (folder / name).write_text(name)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zoo.create_model("toy", dims=(4,), pattern="a, b(c=1)")


@pytest.fixture
def folder(model, tmp_path):
    return zoo.save(model, tmp_path / "model")


def files(path):
    return sorted(p.name for p in path.iterdir())


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_there_and_back(model, folder):
    again = zoo.load(folder)
    assert not again.training
    assert (again.name, again.size, again.config) == ("toy", "tiny", model.config)
    assert_same_weights(again, model)
    assert again.head.weight is again.embedding.weight
    tokens = torch.arange(5)[None]
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert files(folder) == ["config.json", "model.safetensors"]
    assert files(folder.parent) == ["model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(model, tmp_path, dtype):
    again = zoo.load(zoo.save(model.to(dtype), tmp_path / "m"))
    assert_same_weights(again, model)
    assert again.made.dtype == torch.float32


def test_an_old_checkpoint_is_replaced_as_a_whole(model, tmp_path):
    folder = tmp_path / "m"
    zoo.save(model, folder, tokenizer=Words("words.json", "old.model"))
    (folder / "notes.txt").write_text("mine")
    assert files(folder) == ["config.json", "model.safetensors", "notes.txt", "old.model", "words.json"]
    with torch.no_grad():
        model.head.weight.add_(1)
    zoo.save(model, folder, tokenizer=Words("words.json"))
    assert files(folder) == ["config.json", "model.safetensors", "notes.txt", "words.json"]
    assert_same_weights(zoo.load(folder), model)


def test_a_full_disk_keeps_the_old_checkpoint(model, folder):
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    large = zoo.create_model("toy", d_model=64, vocab_size=10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file may grow past this: as a full disk
    try:
        with pytest.raises(UserError) as refused:
            zoo.save(large, folder)
        with pytest.raises(UserError, match="nothing was left behind"):
            zoo.save(large, folder.parent / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(refused.value).startswith(f"no checkpoint could be written to {folder} (")
    assert str(refused.value).endswith("the checkpoint that was there is kept")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert files(folder.parent) == ["model"]
    assert_same_weights(zoo.load(folder), model)


@pytest.mark.parametrize("step", ["_sync", "save_file"])
def test_no_space_left_at_any_step_keeps_the_old_checkpoint(model, folder, monkeypatch, step):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, step, full)
    with pytest.raises(UserError, match="No space left on device"):
        zoo.save(zoo.create_model("toy", "big"), folder)
    assert files(folder.parent) == ["model"]
    assert_same_weights(zoo.load(folder), model)


def test_only_models_of_the_registry_are_saved(tmp_path):
    with pytest.raises(UserError, match=r"only models of zoo.create_model can be saved: this Linear has no 'name'"):
        zoo.save(torch.nn.Linear(1, 1), tmp_path / "m")


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def lie_about_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def scramble_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


def pickled_instead(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


DAMAGE = {
    "cut short": (lambda f: cut(f, 500), "is damaged or cut short"),
    "empty": (lambda f: cut(f, 0), "is damaged or cut short"),
    "header too long": (lie_about_header, "is damaged or cut short"),
    "header scrambled": (scramble_header, "is damaged or cut short"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors, pytorch_model.bin or index",
    ),
    "nothing pickled": (
        pickled_instead,
        "6 tensors are missing (kept, embedding.weight, blocks.{0-1}.0.weight, blocks.{0-1}.0.bias)",
    ),
    "config cut": (lambda f: (f / "config.json").write_text('{"format": "zo'), "config.json is damaged"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "does not say format 'zoo'"),
    "of nothing": (lambda f: (f / "config.json").write_text("{}"), "neither format 'zoo' nor a model_type"),
    "foreign": (
        lambda f: (f / "config.json").write_text('{"model_type": "lama"}'),
        "'lama', which zoo does not read; did you mean 'llama'?",
    ),
    "newer": (lambda f: rewrite(f, version=9), "has version 9 of the format, and this zoo reads 1; update seqzoo"),
    "no config": (lambda f: rewrite(f, config=None), "'config' must be dict"),
    "unknown model": (lambda f: rewrite(f, model="toi"), "no model 'toi'; did you mean 'toy'?"),
    "unknown size": (lambda f: rewrite(f, size="bi"), "no size 'bi'"),
    "unknown field": (lambda f: rewrite(f, config={"depth": 3}), "model 'toy' has no field 'depth'"),
    "other shapes": (lambda f: rewrite(f, config={"d_model": 16}), "(8,) in the file and must be (16,)"),
    "more layers": (
        lambda f: rewrite(f, config={"n_layers": 3}),
        "2 tensors are missing (blocks.2.0.weight, blocks.2.0.bias)",
    ),
    "fewer layers": (
        lambda f: rewrite(f, config={"n_layers": 1}),
        "2 are unknown (blocks.1.0.bias, blocks.1.0.weight)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_one_sentence(folder, damage):
    change, sentence = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        zoo.load(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_paths_that_hold_no_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no checkpoint at .*: there is no such folder"):
        zoo.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"is no checkpoint: it has no config.json"):
        zoo.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="has not saved a model yet; zoo resume"):
        zoo.load(tmp_path)

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub\nat all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"^no folder some/model here, and .* hub \(cannot reach the hub\); .*"):
        zoo.load("some/model")


def test_a_name_on_the_hub_is_downloaded(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert_same_weights(zoo.load("some/model"), model)
    assert asked == ["some/model"]


def trainer_state(model):
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": weights | {"val_loss.total": torch.zeros(())}, "zoo_model": checkpoint.describe(model)}


def test_a_run_is_its_final_model_or_its_last_state(model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    torch.save(trainer_state(model), run / "checkpoints" / "last.ckpt")
    assert_same_weights(zoo.load(run), model)
    assert_same_weights(zoo.load(run / "checkpoints" / "last.ckpt"), model)
    final = zoo.create_model("toy", "big")
    zoo.save(final, run / "checkpoint")
    assert_same_weights(zoo.load(run), final)
    shutil.rmtree(run / "checkpoint")
    assert zoo.load(run).config == replace(model.config)


def test_a_damaged_state_of_a_trainer_is_one_sentence(model, tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(trainer_state(model), path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"last.ckpt is damaged or cut short"):
        zoo.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="does not describe a model of zoo"):
        zoo.load(path)


class Harmful:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_never_runs_code(model, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save(trainer_state(model) | {"extra": Harmful()}, path)
    with pytest.raises(UserError, match="holds objects other than tensors"):
        zoo.load(path)
    assert "code ran" not in capsys.readouterr().out
