"""Masked-token prediction: what is hidden, what is scored, resume, and which model and data go with it."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.config import compose
from zoo.errors import UserError
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.tasks.language_modelling import LanguageModelling
from zoo.train.tasks.masked_language_modelling import MaskedLanguageModelling, mask_symbol

SMALL = {"d_model": 16, "n_layers": 1, "d_state": 4, "head_dim": 8}
MASK = 257


class Ranks:
    """What the task asks a trainer."""

    def __init__(self, rank: int = 0):
        self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}


def make(rank: int = 0, **settings: Any) -> MaskedLanguageModelling:
    torch.manual_seed(0)
    model = zoo.create_model("hydra", **SMALL, vocab_size=258, dropout=0.0)
    task = MaskedLanguageModelling(model, AdamW(), Limits(), PyDocs(), **settings)
    task._trainer = Ranks(rank)  # type: ignore[assignment]
    return task


def batch(rows: int = 64) -> dict[str, Tensor]:
    tokens = torch.randint(256, (rows, 200), generator=torch.Generator().manual_seed(1))
    tokens[:, ::50] = 256  # between documents
    targets = tokens.roll(-1, 1)
    targets[-1, 150:] = -100  # padding
    return {"tokens": tokens, "targets": targets, "n_bytes": torch.tensor(7)}


def test_what_is_hidden_is_berts_rule() -> None:
    given = batch()
    made = make().prepared(given, 3, training=True)
    chosen, there = made["targets"] != -100, given["targets"] != -100
    free = there & (given["tokens"] != 256)
    assert not (chosen & ~free).any()
    assert torch.equal(made["mask"], there)
    assert torch.equal(made["targets"][chosen], given["tokens"][chosen])
    assert torch.equal(made["tokens"][~chosen], given["tokens"][~chosen])
    n = int(chosen.sum())
    within = lambda count, of, share: abs(count / of - share) < 4 * math.sqrt(share * (1 - share) / of)
    assert within(n, int(free.sum()), 0.3)
    seen, was = made["tokens"][chosen], given["tokens"][chosen]
    assert within(int((seen == MASK).sum()), n, 0.8)
    assert within(int((seen == was).sum()), n, 0.1 + 0.1 / 257)
    assert seen.max() == MASK
    validation = make().prepared(given, 3, training=False)
    assert within(int((validation["targets"] != -100).sum()), int(free.sum()), 0.15)


def test_what_is_hidden_depends_on_the_seed_the_batch_and_the_rank_alone() -> None:
    given = batch(4)

    def hidden(index: int = 0, training: bool = True, **settings: Any) -> Tensor:
        torch.manual_seed(torch.seed())  # whatever the global generator does
        return make(**settings).prepared(given, index, training=training)["tokens"]

    assert torch.equal(hidden(), hidden())
    for other in (hidden(1), hidden(training=False), hidden(seed=1), hidden(rank=1)):
        assert not torch.equal(hidden(), other)


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens() -> None:
    task = make()
    made = task.prepared(batch(4), 0, training=True)
    nll, scored = task.batch_loss(made)
    logits, _ = task.model(made["tokens"], mask=made["mask"])
    chosen = made["targets"] != -100
    assert scored == chosen.sum()
    torch.testing.assert_close(nll, F.cross_entropy(logits[chosen], made["targets"][chosen], reduction="sum"))
    nothing = made | {"targets": torch.full_like(made["targets"], -100)}
    nll, scored = task.batch_loss(nothing)
    assert (nll, scored) == (0, 0)
    nll.backward()  # a batch without a chosen token changes nothing
    assert all((p.grad == 0).all() for p in task.model.parameters() if p.grad is not None)


def test_packed_documents_keep_their_borders() -> None:
    task, bounds = make(), torch.tensor([0, 90, 200], dtype=torch.int32)
    given = {name: z[:1] for name, z in batch(2).items() if name != "n_bytes"} | {"cu_seqlens": bounds}
    made = task.prepared(given, 0, training=True)
    assert "mask" not in made
    changed = made | {"tokens": made["tokens"].clone()}
    changed["tokens"][:, 90:] = 5
    losses = [task.batch_loss(b | {"targets": b["targets"].index_fill(1, torch.arange(90, 200), -100)})
              for b in (made, changed)]  # fmt: skip
    assert losses[0] == losses[1]


def settings(*more: str) -> dict[str, Any]:
    small = [f"model.{key}={value}" for key, value in SMALL.items()]
    return compose([
        "model=hydra", *small, "data.seq_len=48", "data.batch_size=4", "trainer.accelerator=cpu",
        "trainer.max_steps=6", "trainer.val_every=3", "trainer.log_every=1", "trainer.limit_val_batches=2",
        "trainer.checkpoint_every=2", *more,
    ])  # fmt: skip


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        clock = ("tokens_per_second", "elapsed")
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(file)]


class Stop(fit.Callback):
    """Ends a run after some steps, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    "more", [(), ("data.packing=packed", "trainer.accumulate_grad_batches=2")], ids=["cut", "packed"]
)
def test_train_stop_resume_evaluate(tmp_path: Path, more: tuple[str, ...]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit.run(settings(*more), whole) == 0
    with pytest.raises(RuntimeError, match="stopped"):
        fit.run(settings(*more), broken, callbacks=[Stop(5)])
    assert fit.resume(broken) == 0
    assert rows(broken) == rows(whole)
    last = rows(whole)[-1]
    assert 0 < float(last["val_loss"]) < 6
    assert 0 <= float(last["val_accuracy"]) <= 1
    found = evaluate(whole, [])
    assert found["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(last["val_accuracy"]))
    model = zoo.load(whole)
    assert model.config.vocab_size == 258


def test_a_checkpoint_without_a_run_is_measured_by_its_models_task(tmp_path: Path) -> None:
    folder = zoo.save(make().model, tmp_path / "m")
    found = evaluate(folder, ["data.seq_len=32", "trainer.limit_val_batches=1", "data.tokenizer=bytes"])
    assert set(found) == {"loss", "accuracy"}


def test_the_mask_is_the_tokenizers_own_where_it_has_one() -> None:
    class Tokenizer:
        eos_id, mask_id = 1, 4

    class Data:
        tokenizer, vocab_size, metrics, n_classes = Tokenizer(), 10, ("bits_per_byte",), None

    assert mask_symbol(Data()) == 4
    assert MaskedLanguageModelling.fields(Data()) == {"vocab_size": 10}
    assert mask_symbol(PyDocs()) == MASK
    assert MaskedLanguageModelling.fields(PyDocs()) == {"vocab_size": 258}


def test_refusals() -> None:
    hydra = zoo.create_model("hydra", **SMALL, vocab_size=258)
    gla = zoo.create_model("gla", d_model=16, n_layers=1, vocab_size=258)
    rest = (AdamW(), Limits(), PyDocs())
    with pytest.raises(UserError, match=r"predicts the next token, and hydra sees it: .* use task=masked_language_mod"):
        LanguageModelling(hydra, *rest)
    with pytest.raises(UserError, match=r"a model that sees both sides of them, and gla sees only the past; use task="):
        MaskedLanguageModelling(gla, *rest)
    with pytest.raises(UserError, match="predicts tokens, and hydra has no head for them"):
        MaskedLanguageModelling(zoo.create_model("hydra", **SMALL, vocab_size=258, n_classes=2), *rest)
    with pytest.raises(UserError, match=r"task.mask_rate must be above 0 and at most 1; got 0"):
        MaskedLanguageModelling(hydra, *rest, mask_rate=0)
    with pytest.raises(UserError, match="hides tokens of text, and MQAR is none"):
        MaskedLanguageModelling.fields(MQAR())


def test_a_models_file_chooses_its_task_unless_the_user_does() -> None:
    kind = "zoo.train.tasks.masked_language_modelling.MaskedLanguageModelling"
    assert compose(["model=hydra"])["task"]["_target_"] == kind
    assert compose(["model=hydra", "seed=3"])["task"]["seed"] == 3
    assert compose(["model=deltanet"])["task"]["_target_"].endswith("LanguageModelling")
    assert compose(["model=hydra", "task=classification"])["task"]["_target_"].endswith("Classification")
    assert compose(["task=classification", "model=hydra"])["task"]["_target_"].endswith("Classification")
