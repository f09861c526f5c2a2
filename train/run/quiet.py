"""Lightning's advertisements and advice that does not apply here, turned off by name while a run lasts."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_lightning"]

MESSAGES = (
    r".*does not have many workers which may be a bottleneck.*",  # our loaders prepare a batch faster than a step
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own use of torch
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Your `IterableDataset` has `__len__` defined.*",
    r".*The number of training batches .* is smaller than the logging interval.*",  # Lightning logs nothing here
    r".*module\(s\) in eval mode at the start of training.*",
    r".*GPU available but not used.*",
    r"FSDP2-wrapped module .* returned a view tensor.*",  # harmful to in-place operations on it; our blocks have none
    r".*You are using `torch\.load` with `weights_only=.*",
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside, Lightning's information ("GPU available: False", tips) is not printed; its warnings are, but for ours."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in MESSAGES:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
