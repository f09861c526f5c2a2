"""Data and a task for the tests of strategies: rows, targets and documents are a pure function of the step."""

import os
from typing import Any

import torch
from torch import Tensor

from zoo.tokenizers import ByteTokenizer
from zoo.train.data.core.base import WHOLE_SEQUENCES, DataModule
from zoo.train.data.core.loader import Source

V = 13
CLASSES = 3


def signal_at(step: int) -> None:
    """SIGNAL_RANK="9 4 1": send the process of rank 1 signal 9 when it asks for training batch 4."""
    which, at, rank = (int(word) for word in os.environ.get("SIGNAL_RANK", "0 -1 0").split())
    if step == at and torch.distributed.is_initialized() and torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), which)


class Rows(Source):
    """`rows` sequences a step, dealt out to the ranks; unequal numbers of scored targets, the last quarter has none in
    every second row. With `documents`, one row whose borders fall inside and on stretches. With `holes` False, targets
    are left out at the ends of rows alone; with `labels`, a sequence has one target."""

    def __init__(
        self,
        rows: int,
        length: int,
        documents: tuple[int, ...] | None = None,
        differ: bool = False,
        extra: bool = False,
        holes: bool = True,
        labels: bool = False,
    ):
        self.rows, self.length, self.documents, self.differ, self.extra = rows, length, documents, differ, extra
        self.holes, self.labels = holes, labels

    def steps(self, world: int) -> int:
        return 1000

    def batch(self, epoch: int, step: int, rank: int, world: int) -> dict[str, Tensor]:
        signal_at(step)
        made = torch.Generator().manual_seed(1000 * epoch + step)
        text = torch.randint(V, (self.rows, self.length + 1), generator=made)
        targets = text[:, 1:].clone()
        targets[self.holes & (torch.rand(targets.shape, generator=made) < 0.3)] = -100
        targets[::2, -(self.length // 4) :] = -100
        if self.differ:
            text = text + torch.distributed.get_rank()
        batch = {"tokens": text[rank::world, :-1].contiguous(), "targets": targets[rank::world].contiguous()}
        if self.labels:
            return {"tokens": batch["tokens"], "targets": text[rank::world, 0] % CLASSES}
        batch["n_bytes"] = 2 * (batch["targets"] != -100).sum()
        if self.extra:
            batch["weights"] = torch.ones(self.rows)
        if self.documents is not None:
            batch["cu_seqlens"] = torch.tensor(self.documents, dtype=torch.int32)
        return batch


class Data(DataModule):
    """Rows for training, three batches of others for validation."""

    metrics = ("bits_per_byte", "perplexity", "accuracy")

    def __init__(self, **settings: Any):
        super().__init__(batch_size=1, num_workers=0, seed=0)
        self.settings = settings
        if not settings.get("holes", True):  # tokens may be hidden; the symbols of this tokenizer are none of them
            self.tokenizer = ByteTokenizer()
        if settings.get("labels"):
            self.schema, self.n_classes = WHOLE_SEQUENCES, CLASSES

    @property
    def vocab_size(self) -> int:
        return V

    def make_sources(self) -> tuple[Source, Source]:
        held_out = Rows(**self.settings)
        held_out.steps = lambda world: 2  # type: ignore[method-assign]
        return Rows(**self.settings), held_out
