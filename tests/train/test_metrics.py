"""Metrics against their definitions, counted by hand."""

import math

import pytest
import torch

from zoo.train.metrics import Accuracy, BitsPerByte, MeanLoss, Perplexity, SequenceAccuracy, count_right


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
    right, scored, sequences, of = count_right(logits, targets, None)
    assert (int(right), int(scored), int(sequences), int(of)) == (3, 4, 1, 2)
    accuracy, whole = Accuracy(), SequenceAccuracy()
    accuracy.update(right, scored)
    whole.update(sequences, of)
    assert float(accuracy.compute()) == 0.75
    assert float(whole.compute()) == 0.5


def test_packed_documents_are_the_sequences() -> None:
    targets = torch.tensor([[1, -100, 2, 0, 1, -100, -100]])
    guesses = torch.tensor([[1, 0, 2, 0, 2, 1, 0]])
    logits = torch.nn.functional.one_hot(guesses, 3).float()
    cu_seqlens = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)  # the second is empty, the last is not scored
    right, scored, sequences, of = count_right(logits, targets, cu_seqlens)
    assert (int(right), int(scored), int(sequences), int(of)) == (3, 4, 1, 2)
