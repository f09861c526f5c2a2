"""The update: the right mean whatever the cut, clipping, skipped steps; and what a run reports."""

import importlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import Tiny, TinyConfig, TinyData
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from zoo.errors import UserError
from zoo.train.callbacks.limits import StopAtLimits
from zoo.train.optim import AdamW, Limits
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.interrupt import Interrupts
from zoo.train.run.loggers import CsvLog, read_csv
from zoo.train.run.quiet import quiet_lightning
from zoo.train.tasks.language_modelling import LanguageModelling

PLAIN = AdamW(lr=0.01, warmup_steps=0, min_lr_ratio=1.0, weight_decay=0.1)


def train(
    data: TinyData,
    steps: int,
    *,
    optim: AdamW = PLAIN,
    callbacks: tuple[Callback, ...] = (),
    task: Any = None,
    **options: Any,
) -> LanguageModelling:
    torch.manual_seed(0)
    limits = Limits(max_steps=steps)
    task = task or LanguageModelling(Tiny(TinyConfig()), PLAIN, limits, data)
    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
            callbacks=[StopAtLimits(limits, task.clock, Interrupts()), *callbacks], **options,
        )  # fmt: skip
        trainer.fit(task, datamodule=EndlessData(data))
    return task


def by_hand(data: TinyData, steps: int, micro: int = 1, clip: float | None = None) -> Tiny:
    """The same training as a bare loop: mean cross entropy over all scored targets of an update."""
    torch.manual_seed(0)
    model = Tiny(TinyConfig())
    optimizer = PLAIN.build(model)
    for step in range(steps):
        batches = [data.batch(0, step * micro + i) for i in range(micro)]
        logits = torch.cat([model(b["tokens"])[0].flatten(0, 1) for b in batches])
        loss = F.cross_entropy(logits, torch.cat([b["targets"].flatten() for b in batches]), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def assert_same(ours: torch.nn.Module, want: torch.nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_update_is_that_of_a_bare_loop() -> None:
    data = TinyData(pad=True)
    assert_same(train(data, 3).model, by_hand(data, 3))


def test_accumulation_is_one_large_batch_also_with_uneven_padding() -> None:
    data = TinyData(pad=True)
    assert_same(train(data, 2, accumulate_grad_batches=3).model, by_hand(data, 2, micro=3))


def test_gradients_are_clipped_by_the_norm_of_the_mean() -> None:
    data = TinyData(pad=True)
    assert_same(train(data, 3, gradient_clip_val=0.05).model, by_hand(data, 3, clip=0.05))


class Poison(Callback):
    """Makes the loss of some batches NaN, by their targets' number of bytes; watches the optimiser."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.snapshots: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.clean = pl_module.model.norm.weight.clone()
            if batch_idx in self.bad:
                pl_module.model.norm.weight[0] = math.nan

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.bad:
            pl_module.model.norm.weight.data.copy_(self.clean)
        state = trainer.optimizers[0].state
        tensors = [p.detach().clone() for p in pl_module.model.parameters()]
        self.snapshots.append(tensors + [t.clone() for s in state.values() for t in s.values()])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    watch = Poison({2, 3})
    task = train(TinyData(), 6, callbacks=(watch,))
    for bad in watch.bad:
        assert all(torch.equal(a, b) for a, b in zip(watch.snapshots[bad], watch.snapshots[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(watch.snapshots[4], watch.snapshots[1], strict=True))
    assert task._skipped.tolist() == [2, 0]
    row = task.training_row()
    assert row["skipped_steps"] == 2
    assert math.isfinite(row["loss"])
    assert math.isfinite(row["grad_norm"])


def test_skipped_steps_in_a_row_end_the_run() -> None:
    data = TinyData()
    task = LanguageModelling(Tiny(TinyConfig()), PLAIN, Limits(max_steps=9), data, max_nonfinite_steps=3)
    with pytest.raises(UserError, match="not finite for 3 steps in a row, up to step 5"):
        train(data, 9, callbacks=(Poison({0, 2, 3, 4, 5}),), task=task)


def test_the_model_may_use_what_validation_made() -> None:
    """Tables made on first use, as rotary ones: inference mode would make them unusable in training."""

    class Caching(Tiny):
        table: Tensor | None = None

        def encode(self, tokens: Tensor, state: Any = None, **options: Any) -> Any:
            hidden, state = super().encode(tokens, state, **options)
            if self.table is None:
                self.table = torch.ones(hidden.shape[-1])
            return hidden * self.table, state

    data = TinyData()
    task = LanguageModelling(Caching(TinyConfig()), PLAIN, Limits(max_steps=1), data)
    with quiet_lightning():
        Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, inference_mode=False
        ).validate(task, datamodule=data, verbose=False)
    train(data, 1, task=task)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def test_the_logits_of_a_batch_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = importlib.import_module("zoo.ops.token_wise.linear_cross_entropy.chunked")
    monkeypatch.setattr(chunked, "CPU_TOKENS", (8, 8))
    model = zoo.create_model("deltanet", d_model=16, n_layers=1, n_heads=1, hidden_size=16, vocab_size=2000)
    task = LanguageModelling(model, PLAIN, Limits(max_steps=1), TinyData())
    batch = TinyData(batch_size=4, seq_len=32, pad=True).batch(0, 0)
    with Largest() as seen:
        nll, scored = task.batch_loss(batch)
        nll.backward()
    assert seen.elements == model.lm_head.weight.numel()  # and 128 tokens' logits are eight times that
    logits = task(batch).flatten(0, 1)
    torch.testing.assert_close(nll / scored, F.cross_entropy(logits, batch["targets"].flatten()))


def test_speed_leaves_pauses_out() -> None:
    task = LanguageModelling(Tiny(TinyConfig()), PLAIN, Limits(max_steps=1), TinyData())
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task._units, task._since = torch.tensor(1000), time.monotonic() - 5.0
    task.pause(3.0)
    assert task._speed() == pytest.approx(500, rel=0.05)
    assert task._units == 0


def test_csv_rows_survive_a_cut(tmp_path: Path) -> None:
    table = CsvLog(tmp_path / "metrics.csv", ["loss"])
    table.log_metrics({"loss": 1.0, "other": 5.0}, 1)
    size = table.size()
    table.log_metrics({"loss": 2.0}, 2)
    with table.path.open("a") as file:
        file.write("3,0.")  # killed in the middle of a line
    table.truncate(size)
    table.log_metrics({"loss": 2.5}, 2)
    assert read_csv(table.path) == [{"step": 1.0, "loss": 1.0}, {"step": 2.0, "loss": 2.5}]
