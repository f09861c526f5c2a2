"""A model is measured on text cut into tokens as in its training."""

from types import SimpleNamespace

import pytest
import torch

import zoo
from zoo import tokenizers
from zoo.checkpoint import describe
from zoo.config import compose, to_yaml
from zoo.errors import UserError
from zoo.train.optim import AdamW, Limits
from zoo.train.run.evaluate import evaluate
from zoo.train.tasks.language_modelling import LanguageModelling

SIZE = {"d_model": 16, "n_layers": 1, "n_heads": 2}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the answer to question {i} is {i * i}.\n" for i in range(400)))
    return path


@pytest.fixture
def settings(corpus):
    return ["data=text_files", f"data.path='{corpus}'", "data.seq_len=32", "trainer.limit_val_batches=2"]


@pytest.fixture
def pieces(corpus):
    return tokenizers.SentencePieceTokenizer.train([corpus.read_text()], 320)


def test_a_checkpoint_brings_its_tokenizer(tmp_path, settings, pieces):
    torch.manual_seed(0)
    folder = zoo.save(zoo.create_model("transformer", **SIZE, vocab_size=320), tmp_path / "m", tokenizer=pieces)
    own = evaluate(folder, settings)
    named = evaluate(folder, [*settings, f"data.tokenizer='{folder}'"])
    assert own == named
    assert own["bits_per_byte"] < evaluate(folder, [*settings, "data.tokenizer=bytes"])["bits_per_byte"]


def test_an_unfinished_run_is_measured_with_its_own_settings(tmp_path, settings, pieces):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    own = [*settings, "data.tokenizer=sentencepiece", "data.vocab_size=320"]
    (run / "config.yaml").write_text(to_yaml(compose(["model=transformer", *own])))
    model = zoo.create_model("transformer", **SIZE, vocab_size=320)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "zoo_model": describe(model)}, run / "checkpoints" / "last.ckpt")
    assert evaluate(run) == evaluate(run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="other data need the run's own tokenizer"):
        evaluate(run, settings)
    assert evaluate(run, own) == evaluate(run)


def test_a_trainers_checkpoint_says_which_model_it_holds(tmp_path):
    model = zoo.create_model("transformer", **SIZE, vocab_size=11)
    task = LanguageModelling(model, AdamW(), Limits(), SimpleNamespace(metrics=("accuracy",)))
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    again = zoo.load(tmp_path / "last.ckpt")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
