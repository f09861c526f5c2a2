"""Trainings of a task with two losses in worlds of 1 and 2 gloo processes; started by test_several_losses.py.

Writes FOLDER/found.json: {world: {case: [weights and rows of each rank]}}.
"""

import json
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zoo.ops import shard
from zoo.registry import create_model
from zoo.train.metrics import Ratio
from zoo.train.optim import AdamW, Limits
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.interrupt import Interrupts
from zoo.train.run.quiet import quiet_lightning
from zoo.train.strategies import ContextParallelStrategy
from zoo.train.tasks.losses import Loss, sequence_means
from zoo.train.tasks.task import Task

V, ROWS, LENGTH, UPDATES = 13, 6, 16, 3
OPTIM = AdamW(lr=0.02, warmup_steps=0, min_lr_ratio=1.0)
WEIGHT = 0.25
# {case: (batches of an update, strategy, the group shares sequences)}
CASES: Mapping[str, tuple[int, str, bool]] = {
    "one batch": (1, "ddp", False),
    "two batches": (2, "ddp", False),
    "each rank by itself": (1, "ddp", False),  # the negative control
    "cut in time": (1, "zeco", True),
    "cut in time, two batches": (2, "zeco", True),
}


def whole_batch(number: int) -> dict[str, Tensor]:
    """Six rows; "targets" are scored in five of them, "bounded" says where the second loss is, in two."""
    made = torch.Generator().manual_seed(number)
    text = torch.randint(V, (ROWS, LENGTH + 1), generator=made)
    targets = text[:, 1:].clone()
    targets[torch.arange(LENGTH) >= torch.randint(3, LENGTH, (ROWS, 1), generator=made)] = -100
    targets[number % ROWS] = -100
    bounded = torch.rand(ROWS, LENGTH, generator=made) < 0.4
    bounded[[0, 2, 3, 4]] = False
    return {"tokens": text[:, :-1].contiguous(), "targets": targets, "bounded": bounded}


class Batches:
    """Batches by number, of which rank 0 of two gets four rows and rank 1 two, unless they share them."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared

    def __iter__(self) -> Any:
        distributed = torch.distributed.is_initialized() and not self.shared
        own = slice(None) if not distributed else (slice(4), slice(4, None))[torch.distributed.get_rank()]
        for number in range(100):
            yield {name: part[own] for name, part in whole_batch(number).items()}


class Data(LightningDataModule):
    schema: Mapping[str, Any] = {"tokens": 1, "targets": 1, "bounded": 1}

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared

    def train_dataloader(self) -> Batches:
        return Batches(self.shared)

    def val_dataloader(self) -> DataLoader[Any]:
        held_out: Any = [batch for number, batch in enumerate(Batches(self.shared)) if number in (50, 51)]
        return DataLoader(held_out, batch_size=None)


class Certainty(Ratio):
    """The mean logarithm of the largest probability, in tenths of it."""

    name = "certainty"
    label = "how sure"
    unit = "dB"
    better = "higher"
    digits = 1

    def update(self, logits: Tensor, batch: dict[str, Tensor]) -> None:  # type: ignore[override]
        largest = logits.log_softmax(-1).amax(-1)[batch["targets"] != -100]
        super().update((10 / math.log(10)) * largest.sum().float(), torch.tensor(largest.numel()))


class TwoLosses(Task):
    """Cross entropy, and the square of log Z where the data say so."""

    loss_names = ("text", "bound")
    metric_classes = (Certainty,)

    def losses_of(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Loss]:
        logits = logits.double()
        nll = F.cross_entropy(logits.transpose(1, 2), batch["targets"], ignore_index=-100, reduction="none")
        return {
            "text": sequence_means(nll, batch["targets"] != -100),
            "bound": sequence_means(logits.logsumexp(-1).square(), batch["bounded"], weight=WEIGHT),
        }

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scored = {"text": batch["targets"] != -100, "bound": batch["bounded"]}
        return {name: there.any(1).sum() for name, there in scored.items()}


class TinyTwo(TwoLosses):
    """Two losses on tiny's letters: all targets, and the last one."""

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        return {"vocab_size": data.vocab_size}

    def losses_of(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Loss]:
        nll = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
        return {"text": sequence_means(nll), "bound": sequence_means(nll[:, -1:], weight=0.5)}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys(self.loss_names, torch.tensor(len(batch["tokens"])))


class ByItself(TwoLosses):
    """Each rank divides by its own counts, as a mean of means would."""

    def _several(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        totals, counts = self._losses.add(self.losses(batch))
        return self._losses.weighted(totals, counts * self.trainer.world_size), torch.zeros_like(counts[0])


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("gla", "tiny", d_model=16, n_layers=1, n_heads=2, hidden_size=16, vocab_size=V).double()


def fit(task: Task, *, together: int = 1, strategy: Any = "auto", devices: int = 1, shared: bool = False) -> Trainer:
    with quiet_lightning(), Interrupts():
        trainer = Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, max_steps=UPDATES, max_epochs=-1,
            precision="64-true", accumulate_grad_batches=together, use_distributed_sampler=False, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            inference_mode=False, val_check_interval=UPDATES * together, check_val_every_n_epoch=None,
        )  # fmt: skip
        trainer.fit(task, datamodule=EndlessData(Data(shared), task))
    return trainer


def train(case: str, world: int) -> dict[str, Any]:
    together, name, shared = CASES[case]
    strategy: Any = "auto"
    if world > 1:
        strategy = ContextParallelStrategy(method=name, timeout=120) if shared else name
    kind = ByItself if case == "each rank by itself" else TwoLosses
    task = kind(model(), OPTIM, Limits(max_steps=UPDATES), Data())
    trainer = fit(task, together=together, strategy=strategy, devices=world, shared=shared)
    row = {key: value for key, value in task.training_row().items() if key.startswith("loss")}
    return {
        "weights": [float(x) for p in task.model.parameters() for x in p.detach().flatten()],
        "row": row | {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def process(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    made = {case: train(case, world) for case in CASES}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(made))


def main(folder: Path) -> None:
    """Fork the processes of each world."""
    assert shard.current() is None
    context = multiprocessing.get_context("fork")
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=process, args=(rank, world, port, folder)) for rank in range(world)]
        for each in processes:
            each.start()
        for each in processes:
            each.join()
        assert not any(each.exitcode for each in processes), [each.exitcode for each in processes]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
