"""The share of positions, and of whole sequences, that the most likely token gets right."""

from zoo.train.metrics.metric import Ratio

__all__ = ["Accuracy", "LastAccuracy", "SequenceAccuracy"]


class Accuracy(Ratio):
    """The part of the scored positions whose most likely token is the target. `update(n_right, n_scored)`."""

    name = "accuracy"
    better = "higher"


class SequenceAccuracy(Ratio):
    """The part of the sequences with every scored position right. `update(n_right, n_sequences)`."""

    name = "sequence_accuracy"
    label = "sequences right"
    better = "higher"


class LastAccuracy(Ratio):
    """The part of the sequences whose last scored position is right. `update(n_right, n_sequences)`."""

    name = "last_accuracy"
    label = "last right"
    better = "higher"
