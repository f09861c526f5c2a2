"""Sequence classification on scikit-learn's digits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.config import compose
from zoo.errors import UserError
from zoo.train.data.images import digits
from zoo.train.data.images.digits import Digits
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.tasks.classification import Classification
from zoo.train.tasks.language_modelling import LanguageModelling
from zoo.train.tasks.masked_language_modelling import MaskedLanguageModelling

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
SMALL = [
    "model.d_model=32", "model.n_layers=1", "model.d_state=8", "model.head_dim=16", "model.pooling=mean",
    "model.init_std=0.2", "model.dropout=0",
]  # fmt: skip


def test_digits_are_the_images_each_once_an_epoch() -> None:
    data = Digits(batch_size=32, seed=3)
    train, val = data.sources
    images = sklearn.datasets.load_digits()
    assert (train.steps(1), val.steps(1), train.steps(2)) == (1437 // 32, 12, 1437 // 64)
    seen = torch.cat([train.batch(0, step, 0, 1)["tokens"] for step in range(train.steps(1))])
    known = {tuple(row): int(label) for row, label in zip(images.data.astype(int), images.target, strict=True)}
    assert len({tuple(row) for row in seen.tolist()}) == len(seen)
    first = train.batch(0, 0, 0, 1)
    assert [known[tuple(row)] for row in first["tokens"].tolist()] == first["targets"].tolist()
    assert torch.equal(train.batch(0, 0, 0, 1)["tokens"], Digits(seed=3).sources[0].batch(0, 0, 0, 1)["tokens"])
    assert not torch.equal(train.batch(1, 0, 0, 1)["tokens"], first["tokens"])
    halves = [train.batch(0, 0, rank, 2)["targets"] for rank in (0, 1)]
    together = torch.stack(halves, 1).flatten()
    assert torch.equal(together[:32], first["targets"])
    held = [val.batch(0, step, 0, 1) for step in range(12)]
    targets = torch.cat([b["targets"] for b in held])
    assert np.array_equal(targets[:360], images.target[-360:])
    assert (targets[360:] == -100).all()


def settings(*more: str) -> dict[str, Any]:
    return compose([
        "model=hydra", "task=classification", "data=digits", *SMALL, "trainer.accelerator=cpu", *more,
    ])  # fmt: skip


@pytest.mark.everything
def test_a_small_encoder_learns_to_read(tmp_path: Path) -> None:
    config = settings("trainer.max_steps=80", "trainer.val_every=80", "optim.lr=1e-2", "optim.warmup_steps=10")
    assert fit.run(config, tmp_path / "run") == 0
    found = evaluate(tmp_path / "run", [])
    assert found["accuracy"] > 0.3  # 0.1 by chance; the full size and length are on the card
    model = zoo.load(tmp_path / "run")
    assert (model.config.vocab_size, model.config.n_classes) == (17, 10)
    alone = evaluate(tmp_path / "run" / "checkpoint", ["data=digits"])
    assert alone == pytest.approx(found)


def test_accuracy_counts_the_labelled_sequences_alone() -> None:
    """Of ten sequences six have a label and four of these are told right; more batches add to it."""
    torch.manual_seed(0)
    model = zoo.create_model("hydra", d_model=16, n_layers=1, head_dim=8, vocab_size=17, n_classes=10).eval()
    task = Classification(model, AdamW(), Limits(), Digits())
    tokens = torch.randint(17, (10, 12))
    said = task({"tokens": tokens}).argmax(-1)
    targets = torch.where(torch.arange(10) < 4, said, (said + 1) % 10).masked_fill(torch.arange(10) >= 6, -100)
    task.validation_step({"tokens": tokens, "targets": targets}, 0)
    assert float(task.val_metrics["accuracy"].compute()) == pytest.approx(4 / 6)
    task.validation_step({"tokens": tokens, "targets": said}, 1)
    assert float(task.val_metrics["accuracy"].compute()) == pytest.approx(14 / 16)


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = zoo.create_model("hydra", d_model=16, n_layers=1, head_dim=8, vocab_size=17)
    with pytest.raises(UserError, match="needs a model that tells classes apart, and hydra predicts tokens"):
        Classification(model, AdamW(), Limits(), Digits())
    with pytest.raises(UserError, match="needs data that label whole sequences, and PyDocs does not; use data=digits"):
        Classification.fields(PyDocs())
    for task in (LanguageModelling, MaskedLanguageModelling):
        with pytest.raises(UserError, match="is about tokens, and Digits labels whole sequences; use task=classificat"):
            task.fields(Digits())
    causal = compose(["model=gla", "task=classification", "data=digits", "trainer.accelerator=cpu"])
    with pytest.raises(UserError, match="Classification needs a model with the field n_classes, and gla has none"):
        fit.run(causal, tmp_path / "causal")
    with pytest.raises(UserError, match=r"model.n_classes is 3 and the data have 10 classes"):
        fit.run(settings("model.n_classes=3"), tmp_path / "few")
    monkeypatch.setattr(digits, "load_digits", None)
    with pytest.raises(
        UserError, match="data=digits needs the images that come with scikit-learn; pip install 'seqzoo"
    ):
        Digits().setup()
