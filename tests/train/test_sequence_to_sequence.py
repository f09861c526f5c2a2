"""From one sequence to another, on reversal: the data, the loss, greedy decoding, a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.config import compose
from zoo.errors import UserError
from zoo.layers import EncoderDecoder
from zoo.train.data.synthetic.reverse import Reverse
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.tasks.sequence_to_sequence import SequenceToSequence, decode_greedily


def small(**fields: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    model = zoo.create_model("encoder_decoder", d_model=32, n_layers=1, hidden_size=32, vocab_size=18, **fields)
    assert isinstance(model, EncoderDecoder)
    return model


def batch_of(rows: int, **settings: Any) -> dict[str, torch.Tensor]:
    return Reverse(batch_size=rows, **settings).sources[1].batch(0, 0, 0, 1)


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 5, "seq_len": 6, "min_len": 1}])
def test_a_target_is_its_source_from_the_end(settings: dict[str, int]) -> None:
    data = Reverse(batch_size=16, **settings)
    batch = data.sources[0].batch(0, 0, 0, 1)
    for row in range(16):
        length = int(batch["source_lengths"][row])
        source = batch["source"][row].tolist()
        turned = source[:length][::-1]
        assert data.min_len <= length <= data.seq_len
        assert max(source[:length]) < data.begin
        assert set(source[length:]) <= {data.begin}
        targets, tokens = batch["targets"][row].tolist(), batch["tokens"][row].tolist()
        assert targets[: length + 1] == [*turned, data.end]
        assert set(targets[length + 1 :]) <= {-100}
        assert tokens[: length + 1] == [data.begin, *turned]
        assert set(tokens[length + 1 :]) <= {data.begin}


def test_samples_are_a_function_of_seed_and_number_and_validation_has_its_own() -> None:
    data = Reverse(vocab_size=6, seq_len=5, min_len=4, batch_size=64)
    train, val = data.sources
    first = train.batch(1, 2, 0, 1)
    again = Reverse(vocab_size=6, seq_len=5, min_len=4, batch_size=64).sources[0].batch(1, 2, 0, 1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(train.batch(1, 3, 0, 1)["source"], first["source"])
    halves = [train.batch(1, 2, rank, 2)["source"] for rank in (0, 1)]
    assert len({tuple(row) for half in halves for row in half.tolist()} & {tuple(r) for r in first["source"].tolist()})

    def seen(source: Any, steps: int) -> set[tuple[int, ...]]:
        return {tuple(row) for step in range(steps) for row in source.batch(0, step, 0, 1)["source"].tolist()}

    assert not seen(train, 40) & seen(val, 8)


def test_the_loss_is_that_of_the_logits_and_padding_counts_nothing() -> None:
    model, batch = small(), batch_of(4)
    task = SequenceToSequence(model, AdamW(), Limits(max_steps=1), Reverse())
    nll, scored = task.batch_loss(batch)
    logits = task(batch)
    want = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(nll, want)
    assert int(scored) == int((batch["source_lengths"] + 1).sum())
    wider = {**batch, "source": F.pad(batch["source"], (0, 3), value=7)}
    torch.testing.assert_close(task.batch_loss(wider)[0], nll)


def test_greedy_decoding_is_right_exactly_where_the_whole_target_is() -> None:
    """What the run reports as sequences right is what a decoder would write."""
    model, batch = small(init_std=0.5), batch_of(64, vocab_size=18, seq_len=2, min_len=1)
    steps = batch["targets"].shape[1]
    decoded = decode_greedily(model, batch["source"], batch["source_lengths"], 16, steps)
    scored = batch["targets"] != -100
    with torch.no_grad():
        argmax = model(batch["tokens"], source=batch["source"], source_lengths=batch["source_lengths"])[0].argmax(-1)
    forced = ((argmax == batch["targets"]) | ~scored).all(1)
    free = ((decoded == batch["targets"]) | ~scored).all(1)
    assert torch.equal(forced, free)
    same = batch["tokens"][:, :1].eq(16).all() and torch.equal(decoded[:, 0], argmax[:, 0])
    assert same, "the first token depends on the source alone"


def test_a_run_trains_shows_and_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([
        "model=encoder_decoder", "model.d_model=32", "model.n_layers=1", "model.hidden_size=32", "data.batch_size=16",
        "data.val_samples=32", "trainer.max_steps=6", "trainer.val_every=6", "trainer.accelerator=cpu",
    ])  # fmt: skip
    run = tmp_path / "run"
    assert fit.run(config, run) == 0
    said = capsys.readouterr().out
    assert "sequences right" in said
    assert "decoded" in said
    measured = evaluate(run)
    assert set(measured) == {"loss", "accuracy", "sequence_accuracy"}
    assert evaluate(run / "checkpoint", ["data.val_samples=32", "data.batch_size=16"]) == measured


def test_refusals(tmp_path: Path) -> None:
    for words, rule in (
        (["model=gla", "task=sequence_to_sequence", "data=reverse"], "an encoder and a decoder, and gla is none"),
        (["model=encoder_decoder", "data=pydocs"], "needs pairs of sequences, and PyDocs has none"),
        (["model=encoder_decoder", "data.vocab_size=3"], r"data\.vocab_size=3: raise it to 4"),
        (["model=encoder_decoder", "data.min_len=20"], "between 1 and data.seq_len=16"),
    ):
        with pytest.raises(UserError, match=rule):
            fit.run(compose([*words, "trainer.accelerator=cpu"]), tmp_path / "refused")
