"""A run that stops anywhere and goes on sees the same batches as one that does not stop."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.train.data.core.base import DataModule
from zoo.train.data.synthetic.copying import Copying
from zoo.train.data.synthetic.induction_heads import InductionHeads
from zoo.train.data.synthetic.mqar import MQAR
from zoo.train.data.text.pydocs import PyDocs

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:.*LeafSpec.*is deprecated", "ignore:The '.*_dataloader' does not have many workers"
)

SMALL: dict[str, Callable[..., DataModule]] = {
    "cut": lambda **kw: PyDocs(seq_len=4096, batch_size=10, **kw),  # 10 steps per epoch
    "packed": lambda **kw: PyDocs(seq_len=4096, batch_size=10, packing="packed", **kw),
    "mqar": lambda **kw: MQAR(train_samples=320, **kw),
    "copying": lambda **kw: Copying(train_samples=320, **kw),
    "induction": lambda **kw: InductionHeads(train_samples=320, **kw),
}


def run(module: DataModule, n: int) -> list[dict[str, Tensor]]:
    """The next n batches of a loader, epoch after epoch."""
    loader = module.train_dataloader()
    epochs = itertools.chain.from_iterable(loader for _ in itertools.count())
    return list(itertools.islice(epochs, n))


def assert_same(ours: list[dict[str, Tensor]], want: list[dict[str, Tensor]]) -> None:
    assert len(ours) == len(want)
    for a, b in zip(ours, want, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(
    ("stop", "workers"), [(0, 0), (1, 0), (7, 0), (9, 0), (10, 0), (11, 0), (25, 0), (7, 2), (10, 2)]
)
def test_goes_on_where_it_stopped(kind: str, stop: int, workers: int) -> None:
    make = SMALL[kind]
    whole = make(seed=3)
    assert whole.steps_per_epoch == 10
    want = run(whole, stop + 13)
    first = make(seed=3, num_workers=workers)
    assert_same(run(first, stop), want[:stop])
    state = first.state_dict()
    assert (state["epoch"], state["batches"]) == divmod(stop, 10)
    second = make(seed=3, num_workers=workers)
    second.load_state_dict(state)
    assert_same(run(second, 13), want[stop:])


@pytest.mark.parametrize("kind", SMALL)
def test_epochs_and_seeds_differ(kind: str) -> None:
    make = SMALL[kind]
    batches = run(make(seed=3), 11)
    assert not torch.equal(batches[0]["tokens"], batches[10]["tokens"])
    assert not torch.equal(batches[0]["tokens"], run(make(seed=4), 1)[0]["tokens"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", SMALL)
def test_leaves_the_global_generators_alone(kind: str, workers: int) -> None:
    before = torch.get_rng_state()
    module = SMALL[kind](num_workers=workers)
    run(module, 3)
    next(iter(module.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", SMALL)
def test_ranks_share_one_global_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with half the batch see, interleaved, what one process with the whole batch sees."""
    make = SMALL[kind]
    whole = make()
    alone = whole.train_dataloader()
    halves = []
    for rank in (0, 1):
        half = make()
        half.batch_size = whole.batch_size // 2
        monkeypatch.setattr(half, "_shard", lambda rank=rank: (rank, 2))
        halves.append(half.train_dataloader())
        assert len(halves[-1]) == len(alone)
    for one, left, right in zip(alone, *halves, strict=True):
        if kind == "packed":  # the row is the sample: two ranks make two rows of half the length
            assert torch.equal(one["tokens"], torch.cat([left["tokens"], right["tokens"]], dim=1))
            assert one["n_bytes"] == left["n_bytes"] + right["n_bytes"]
        else:
            assert torch.equal(one["tokens"][0::2], left["tokens"])
            assert torch.equal(one["tokens"][1::2], right["tokens"])


@pytest.mark.parametrize("kind", SMALL)
def test_ranks_validate_on_everything_once_in_equally_many_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SMALL[kind]()

    def scored(rank: int, world: int) -> list[int]:
        monkeypatch.setattr(module, "_shard", lambda: (rank, world))
        return [int((batch["targets"] >= 0).sum()) for batch in module.val_dataloader()]

    alone = sum(scored(0, 1))
    ranks = [scored(rank, 3) for rank in range(3)]
    assert len({len(counts) for counts in ranks}) == 1
    assert sum(map(sum, ranks)) == alone > 0


def test_who_shares_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = PyDocs()
    assert data._shard() == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert data._shard() == (5, 8)
    # a strategy with groups of four ranks that share a sample
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": 1, "num_replicas": 2})  # type: ignore[assignment]
    assert data._shard() == (1, 2)


class Recorder(LightningModule):
    """Trains one number and writes down which batches came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(hash(batch["tokens"].numpy().tobytes()))
        return self.weight * 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert batch["tokens"].ndim == 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / "exception.ckpt")


def fit(module: DataModule, folder: Path, resume: str | None = None, **kwargs: Any) -> list[int]:
    model = kwargs.pop("model", None) or Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveEveryStep(folder)] if resume is None else [],
        **{"max_epochs": 3, **kwargs},
    )
    trainer.fit(model, datamodule=module, ckpt_path=None if resume is None else str(folder / resume))
    return model.seen


SETTINGS: dict[str, tuple[dict[str, Any], int]] = {  # and how many batches that makes
    "epochs": ({}, 30),
    "steps": ({"max_epochs": -1, "max_steps": 27}, 27),
    "limited": ({"limit_train_batches": 4}, 12),
    "validating": ({"val_check_interval": 3}, 30),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_lightning_resumes_anywhere(name: str, tmp_path: Path) -> None:
    settings, length = SETTINGS[name]
    make = SMALL["cut"]
    want = fit(make(), tmp_path, **settings)
    assert len(want) == len(set(want)) == length
    for stop in {1, 3, 4, 8, 9, 10, 11, 20, 21, length - 1} & set(range(length)):
        assert fit(make(), tmp_path, f"{stop}.ckpt", **settings) == want[stop:], stop


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_written_in_mid_step_repeats_the_step(workers: int, tmp_path: Path) -> None:
    class Fails(Recorder):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if len(self.seen) == 13:
                raise RuntimeError("power cut")
            return super().training_step(batch, batch_idx)

    make = SMALL["cut"]
    want = fit(make(), tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(make(num_workers=workers), tmp_path, model=Fails())
    assert fit(make(num_workers=workers), tmp_path, "exception.ckpt") == want[13:]


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    seen = fit(SMALL["cut"](), tmp_path, overfit_batches=2)
    assert seen[:2] * 3 == seen
