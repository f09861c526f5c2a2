"""What all data modules share: checks of common settings, ranks, and a position that survives a restart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule

from zoo.errors import UserError
from zoo.tokenizers import Tokenizer
from zoo.train.data.core.loader import Loader, Source

Metric = Literal["bits_per_byte", "perplexity", "accuracy", "last_accuracy"]


class Time(NamedTuple):
    """Where the part of a batch has time.

    dim: the dimension.
    unit: entries of it that belong together and are one step of time: 1 for tokens, the rows of a patch for pictures
        that are cut by rows of patches, the length of a frame for samples of sound.
    """

    dim: int
    unit: int = 1


# What the part of a batch is, for those that cut it across ranks: its time, a number standing for that dimension with
# unit 1; "documents" (boundaries of packed ones), "once" (a sum over the batch, to be counted on one rank), "same" (for
# every rank).
Part = Time | int | str
BATCH: Mapping[str, Part] = {
    "tokens": Time(1), "targets": Time(1), "mask": Time(1),
    "cu_seqlens": "documents", "n_bytes": "once", "val_set": "same",
}  # fmt: skip
WHOLE_SEQUENCES: Mapping[str, Part] = {**BATCH, "targets": "same"}  # of data that label whole sequences


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How batches are dealt out: what every data module is told.

    Args:
        batch_size: sequences per step and rank.
        num_workers: processes that prepare batches ahead; 0 prepares each when it is asked for.
        seed: the run's seed; data are a pure function of the settings, this, and the position.

    Raises:
        UserError: a number below its least value.
    """

    batch_size: int
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("num_workers", self.num_workers, 0)
        at_least("seed", self.seed, 0)


class DataModule(LightningDataModule):
    """Batches for training and validation out of two sources that a subclass makes in `make_sources`.

    A batch is a dict: "tokens" and "targets", both (B, T) int64, targets already shifted and -100 where nothing is
    scored; where the data have `n_classes`, "targets" (B,), one class per sequence, and -100 for a row that only fills
    the batch; "cu_seqlens" (n + 1,) int32 when B = 1 row holds n documents; "n_bytes" () int64, the bytes of text that
    the scored targets stand for, where the data are text; in validation "val_set" () int64, which of `val_sets` it is
    from, where the data have such: accuracies are given for each by name, too, as `accuracy_at_NAME`.

    Args:
        loading: how batches are dealt out.
        each: its fields by keyword, in place of it.
    """

    tokenizer: Tokenizer | None = None
    metrics: tuple[Metric, ...] = ()
    val_sets: tuple[str, ...] = ()
    n_classes: int | None = None
    schema: Mapping[str, Part] = BATCH

    def __init__(self, loading: LoaderSettings | None = None, **each: int):
        super().__init__()
        loading = LoaderSettings(**each) if loading is None else replace(loading, **each)
        self.loading = loading
        self.batch_size, self.num_workers, self.seed = loading.batch_size, loading.num_workers, loading.seed
        self._sources: tuple[Source, Source] | None = None
        self._start = {"epoch": 0, "batches": 0}
        self._loader: Loader | None = None

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; may read the corpus to know it.

        Raises:
            UserError: the data have no tokens.
        """
        raise UserError(
            f"a vocabulary is that of tokens, and {type(self).__name__} has none; choose the task that the data are "
            "for, or data of text"
        )

    def make_sources(self) -> tuple[Source, Source]:
        """The sources of training and of validation batches, in this order."""
        raise NotImplementedError

    @property
    def sources(self) -> tuple[Source, Source]:
        """Training and validation, made on first use."""
        if self._sources is None:
            self._sources = self.make_sources()
        return self._sources

    def setup(self, stage: str | None = None) -> None:
        """Read or generate what the sources need; errors in the user's data come from here."""
        world = self._shard()[1]
        if self.sources[0].steps(world) < 1:
            raise UserError(
                f"one training step needs data.batch_size={self.batch_size} sequences for each of {world} ranks; the "
                "training data have fewer: lower data.batch_size or data.seq_len, or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of one epoch on each rank."""
        return self.sources[0].steps(self._shard()[1])

    def __len__(self) -> int:
        return self.steps_per_epoch

    def train_dataloader(self) -> Loader:
        """Training batches from the restored position on, else from the beginning."""
        rank, world = self._shard()
        return self._training_loader(self.sources[0], rank, world)

    def _training_loader(
        self, source: Source, rank: int, world: int, steps_of: Callable[[int], int] | None = None
    ) -> Loader:
        """A loader from the restored position on, which the module's own position follows."""
        self._loader = Loader(
            source,
            epoch=self._start["epoch"],
            batches=self._start["batches"],
            rank=rank,
            world=world,
            workers=self.num_workers,
            limit=self._limit(source.steps(world)),
            restart=getattr(self.trainer, "overfit_batches", 0) > 0,
            in_flight=self._in_flight,
            steps_of=steps_of,
        )
        return self._loader

    def val_dataloader(self) -> Loader:
        """All held-out data, in one order."""
        rank, world = self._shard()
        return self._validation_loader(self.sources[1], rank, world)

    def _validation_loader(self, source: Source, rank: int, world: int) -> Loader:
        """Every pass begins at the start."""
        return Loader(source, rank=rank, world=world, workers=self.num_workers, restart=True)

    def state_dict(self) -> dict[str, int]:
        """(epoch, batches of it that training has had): right after every step, and while one is under way."""
        return dict(self._start) if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next `train_dataloader()` start at a saved position."""
        self._start = {"epoch": int(state_dict["epoch"]), "batches": int(state_dict["batches"])}
        if self._loader is not None:
            self._loader.load_state_dict(self._start)

    def _shard(self) -> tuple[int, int]:
        """This process's (rank, world) among those that see different data.

        The strategy knows best: under tensor or context parallelism several ranks share one sample.
        """
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        if kwargs is not None:
            return int(kwargs["rank"]), int(kwargs["num_replicas"])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _limit(self, steps: int) -> int | None:
        """Batches after which Lightning ends an epoch early, so that the next starts a new order, as it expects."""
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return int(limit * steps) if isinstance(limit, float) else limit

    def _in_flight(self) -> int:
        """1 while Lightning works on a batch: a checkpoint written then has not trained on it."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.ready - progress.processed)


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a setting below its least value."""
    if value < least:
        raise UserError(f"data.{name} must be at least {least}; got {value}: raise it")
