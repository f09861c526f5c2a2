"""Metrics, a file each idea: found by their folder, known by their `name`. A task may declare its own beside itself."""

from zoo.train.metrics.accuracy import Accuracy, LastAccuracy, SequenceAccuracy
from zoo.train.metrics.cross_entropy import BitsPerByte, MeanLoss, Perplexity
from zoo.train.metrics.metric import Metric, Ratio
from zoo.train.metrics.right import IGNORED, Right, count_right

__all__ = [
    "IGNORED",
    "Accuracy",
    "BitsPerByte",
    "LastAccuracy",
    "MeanLoss",
    "Metric",
    "Perplexity",
    "Ratio",
    "Right",
    "SequenceAccuracy",
    "count_right",
]
