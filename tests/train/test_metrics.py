"""Metrics against their definitions, counted by hand."""

import math

import pytest
import torch

from zoo.train.callbacks.progress import describe
from zoo.train.metrics import (
    Accuracy,
    BitsPerByte,
    LastAccuracy,
    MeanLoss,
    Perplexity,
    Ratio,
    SequenceAccuracy,
    count_right,
)
from zoo.train.metrics.table import metric_of


def test_sums_over_batches_are_weighted_by_their_counts() -> None:
    loss, perplexity, bits = MeanLoss(), Perplexity(), BitsPerByte()
    for nll, scored, n_bytes in ((6.0, 3, 5), (1.0, 7, 9)):
        loss.update(torch.tensor(nll), torch.tensor(scored))
        perplexity.update(torch.tensor(nll), torch.tensor(scored))
        bits.update(torch.tensor(nll), torch.tensor(n_bytes))
    assert float(loss.compute()) == pytest.approx(0.7)
    assert float(perplexity.compute()) == pytest.approx(math.exp(0.7))
    assert float(bits.compute()) == pytest.approx(7.0 / 14 / math.log(2))


def test_accuracy_per_position_and_per_sequence() -> None:
    targets = torch.tensor([[1, -100, 2], [0, 1, -100], [-100, -100, -100]])
    guesses = torch.tensor([[1, 0, 2], [0, 2, 1], [0, 0, 0]])
    logits = torch.nn.functional.one_hot(guesses, 3).float()
    right = count_right(logits, targets, None)
    assert [int(n) for n in right] == [3, 4, 1, 2, 1]
    accuracy, whole, last = Accuracy(), SequenceAccuracy(), LastAccuracy()
    accuracy.update(right.positions, right.scored)
    whole.update(right.sequences, right.of_sequences)
    last.update(right.last, right.of_sequences)
    assert float(accuracy.compute()) == 0.75
    assert float(whole.compute()) == float(last.compute()) == 0.5


def test_the_last_scored_position_is_judged_alone() -> None:
    targets = torch.tensor([[1, 1, 1, -100], [1, 1, -100, -100], [1, 1, 1, 1], [-100, -100, -100, -100]])
    guesses = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(guesses, 2).float()
    right = count_right(logits, targets, None)
    assert (int(right.last), int(right.sequences), int(right.of_sequences)) == (2, 1, 3)
    packed = count_right(logits.view(1, 16, 2), targets.view(1, 16), torch.arange(0, 17, 4))
    assert [int(n) for n in packed] == [int(n) for n in right]


def test_packed_documents_are_the_sequences() -> None:
    targets = torch.tensor([[1, -100, 2, 0, 1, -100, -100]])
    guesses = torch.tensor([[1, 0, 2, 0, 2, 1, 0]])
    logits = torch.nn.functional.one_hot(guesses, 3).float()
    cu_seqlens = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)  # the second is empty, the last is not scored
    assert [int(n) for n in count_right(logits, targets, cu_seqlens)] == [3, 4, 1, 2, 1]


def test_a_rank_without_a_token_counts_nothing() -> None:
    right = count_right(torch.zeros(3, 0, 7), torch.zeros(3, 0, dtype=torch.int64), None)
    assert [int(x) for x in right] == [0, 0, 0, 0, 0]


def test_every_metric_of_the_folder_is_known_by_its_name_and_reads_by_its_own_word() -> None:
    for column, better, text in (
        ("accuracy", "higher", "accuracy 0.5000"),
        ("sequence_accuracy_at_500", "higher", "sequences right@500 0.5000"),
        ("val_last_accuracy", "higher", "last right 0.5000"),
        ("perplexity", "lower", "perplexity 0.50"),
        ("bits_per_byte", "lower", "bits/byte 0.5000"),
    ):
        metric = metric_of(column)
        assert metric is not None
        assert metric.better == better
        assert describe(({"val_loss": 1.0} if column.startswith("val_") else {}) | {column: 0.5}).endswith(text)
    assert metric_of("grad_norm") is None
    assert describe({"grad_norm": 1.0}) == ""


def test_a_metric_of_ones_own_reads_by_its_own_word() -> None:
    class Distance(Ratio):
        name, label, unit, digits = "test_distance", "far", "dB", 1

    assert describe({"val_loss": 1.0, "val_test_distance": 3.14}) == "validation  loss 1.0000  far 3.1 dB"
    assert describe({"frames_per_second": 12_345.0}) == "frames/s 12.3k"
    assert describe({"loss": 1.0, "loss_log_spectrum": 0.5}) == "loss 1.0000  log spectrum loss 0.5000"
    with pytest.raises(ValueError, match=r"called 'test_distance' already; give .*Other another name"):

        class Other(Ratio):
            name = "test_distance"

    distance = Distance()
    distance.update(torch.tensor(3.0), torch.tensor(4))
    assert float(distance.compute()) == 0.75
