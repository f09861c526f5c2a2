"""A model and data small enough that a test trains them in a second, built to the contracts of the real ones."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.registry import register

V = 11


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    d_model: int = 8
    vocab_size: int = V
    dropout: float = 0.0


class Tiny(nn.Module):
    """Embedding, a running mean as memory, dropout (so that generators matter), head."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.config, self.name, self.size = cfg, "tiny-test", "tiny"
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.norm = nn.LayerNorm(cfg.d_model)
        self.mix = nn.Linear(cfg.d_model, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: Any = None, *, mask: Any = None, cu_seqlens: Any = None) -> Any:
        hidden, state = self.encode(tokens, state)
        return self.head(hidden), state

    def encode(self, tokens: Tensor, state: Any = None, *, mask: Any = None, cu_seqlens: Any = None) -> Any:
        past, n = state if state is not None else (0.0, 0)
        x = self.embedding(tokens)
        total = x.cumsum(1) + past
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None] + n
        h = self.mix(self.norm(total / count) + x)
        return self.dropout(torch.relu(h)), (total[:, -1:], n + x.shape[1])


@register("tiny-test", config=TinyConfig, sizes={"tiny": {}})
def tiny_test(cfg: TinyConfig) -> Tiny:
    return Tiny(cfg)


class Letters:
    """Ten letters and a start symbol."""

    vocab_size, eos_id = V, V - 1

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghij"[i] for i in ids)

    def save(self, folder: Path) -> None:
        (folder / "letters.txt").write_text("abcdefghij")


def signal_at(number: int) -> None:
    """TINY_SIGNALS="9@4 2@6": send this process signal 9 when it asks for training batch 4, counted from 0."""
    for order in os.environ.get("TINY_SIGNALS", "").split():
        which, _, when = order.partition("@")
        if int(when) == number:
            os.kill(os.getpid(), int(which))


class TinyLoader:
    def __init__(self, data: "TinyData", epoch: int, done: int) -> None:
        self.data, self.epoch, self.done = data, epoch, done

    def __len__(self) -> int:
        return self.data.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.done >= self.data.batches:
            self.epoch, self.done = self.epoch + 1, 0
        while self.done < self.data.batches:
            index, self.done = self.done, self.done + 1
            signal_at(self.epoch * self.data.batches + index)
            yield self.data.batch(self.epoch, index)


class TinyData(LightningDataModule):
    """Noisy counting: the next letter is mostly the one after. A pure function of (seed, epoch, index, rank)."""

    def __init__(
        self,
        *,
        batch_size: int = 4,
        batches: int = 7,
        seq_len: int = 12,
        seed: int = 0,
        metrics: tuple[str, ...] = ("bits_per_byte", "perplexity"),
        nan_from: int | None = None,
        val_batches: int = 2,
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size, self.batches, self.seq_len, self.seed = batch_size, batches, seq_len, seed
        self.metrics, self.nan_from, self.val_batches, self.pad = metrics, nan_from, val_batches, pad
        self.vocab_size = V
        self.tokenizer = Letters() if "bits_per_byte" in metrics else None
        self.position = (0, 0)
        self.loader: TinyLoader | None = None

    def batch(self, epoch: int, index: int, rank: int | None = None, world: int | None = None) -> dict[str, Tensor]:
        if torch.distributed.is_initialized() and rank is None:
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world = rank or 0, world or 1
        rows, unscored = [], []
        for row in range(self.batch_size):
            number = (epoch * 10_000 + index) * self.batch_size * world + row * world + rank
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            start = torch.randint(10, (1,), generator=generator)
            noise = (torch.rand(self.seq_len + 1, generator=generator) < 0.2).long()
            unscored.append(number % 5)
            rows.append((start + torch.arange(self.seq_len + 1) + noise) % 10)
        text = torch.stack(rows)
        targets = text[:, 1:].clone()
        if self.pad:  # rows, and so batches and ranks, with different numbers of scored targets
            targets[torch.arange(self.seq_len) < torch.tensor(unscored)[:, None]] = -100
        batch = {"tokens": text[:, :-1].contiguous(), "targets": targets}
        if self.metrics != ("accuracy",):
            batch["n_bytes"] = (targets != -100).sum()
        return batch

    def train_dataloader(self) -> TinyLoader:
        self.loader = TinyLoader(self, *self.position)
        return self.loader

    def val_dataloader(self) -> DataLoader[Any]:
        # A torch loader on purpose: each pass over it draws from the global generator.
        return DataLoader([self.batch(-1, i) for i in range(self.val_batches)], batch_size=None)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"position": (self.loader.epoch, self.loader.done) if self.loader else self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = tuple(state_dict["position"])


def config(**changes: Any) -> dict[str, Any]:
    """A composed config; changes as trainer__max_steps=3."""
    composed: dict[str, Any] = {
        "model": {"name": "tiny-test", "size": "tiny", "d_model": 8, "vocab_size": None, "dropout": 0.0},
        "data": {"_target_": "tiny.TinyData"},
        "task": {"_target_": "zoo.train.tasks.language_modelling.LanguageModelling"},
        "optim": {"_target_": "zoo.train.optim.AdamW", "warmup_steps": 2},
        "trainer": {
            "_target_": "zoo.train.run.trainer.TrainerConfig",
            "max_steps": 4,
            "log_every": 1,
            "val_every": 3,
            "checkpoint_every": 2,
            "sample_every": 0,
            "accelerator": "cpu",
        },
        "strategy": {},
        "logger": {},
        "seed": 0,
        "run_dir": None,
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            composed[group][name] = value
        else:
            composed[group] = value
    return composed


sys.modules.setdefault("tiny", sys.modules[__name__])  # the configs' name for this file, whatever imported it
