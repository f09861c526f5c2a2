"""Metrics by their names: those of this folder are found, others are known once their module is imported."""

import functools

from zoo import _discover
from zoo.train import metrics
from zoo.train.metrics.metric import REGISTERED, Metric, base_name

__all__ = ["metric_of"]


def metric_of(column: str) -> type[Metric] | None:
    """The metric behind a column, as "val_accuracy_at_500"; None for a column that is no metric."""
    _load()
    return REGISTERED.get(base_name(column))


@functools.cache
def _load() -> None:
    """Import every file of the folder, once."""
    _discover.load_modules(metrics)
