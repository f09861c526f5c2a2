"""Trainings under context parallelism in worlds of 1, 2 and 4 gloo processes; started by test_strategies.py.

Everything is imported once; each world is forked from here and finds itself as under torchrun. Every process runs the
cases of its world one after the other, each a fit of its own. Writes FOLDER/found.json: {case: {layout: what came}}.
"""

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from sharded_cases_training import CASES, OWN, Case
from sharded_data import Data, V

from zoo.layers import Dropout
from zoo.ops import shard
from zoo.registry import create_model
from zoo.train.metrics import count_right
from zoo.train.optim import AdamW, Limits
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.interrupt import Interrupts
from zoo.train.run.quiet import quiet_lightning
from zoo.train.strategies import ContextParallelFSDPStrategy, ContextParallelStrategy
from zoo.train.strategies.fsdp import whole_weights
from zoo.train.tasks.classification import Classification
from zoo.train.tasks.language_modelling import LanguageModelling
from zoo.train.tasks.masked_language_modelling import MaskedLanguageModelling

TASKS: dict[str, Any] = {
    "classification": Classification, "language_modelling": LanguageModelling,
    "masked_language_modelling": MaskedLanguageModelling,
}  # fmt: skip
HANGS_AFTER = 400  # seconds; then every process says where it stands


class Losses(Callback):
    """The mean loss over all ranks of every batch, in full precision."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="sum")))


def train(case: Case, dp: int, cp: int, folder: Path) -> dict[str, Any]:
    """One fit; {"losses", "weights" (their sum, sum of squares and all of them), "metrics", "groups"}."""
    torch.manual_seed(0)
    model = (
        OWN[case.model]() if case.model in OWN else create_model(case.model, "tiny", **{"vocab_size": V, **case.fields})
    )
    if case.double:
        model = model.double()
    data = Data(**case.data)
    task = TASKS[case.task](model, AdamW(lr=0.02, warmup_steps=1), Limits(max_steps=100), data)
    strategy: Any = "auto"
    if dp * cp > 1 or case.fsdp:
        cls = ContextParallelFSDPStrategy if case.fsdp else ContextParallelStrategy
        strategy = cls(cp_size=cp, timeout=120, **case.strategy)
    before = groups()
    losses = Losses()
    with quiet_lightning(), Interrupts():
        trainer = Trainer(
            accelerator="cpu", devices=dp * cp, strategy=strategy, max_steps=case.steps, max_epochs=-1,
            precision="64-true" if case.double and not case.fsdp else case.precision,
            gradient_clip_val=0.3, accumulate_grad_batches=case.accumulate, use_distributed_sampler=False,
            inference_mode=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[losses], default_root_dir=folder,
            val_check_interval=case.steps * case.accumulate, check_val_every_n_epoch=None,
        )  # fmt: skip
        resumed = folder / f"{case.resume}.ckpt" if case.resume else None
        trainer.fit(task, datamodule=EndlessData(data), ckpt_path=resumed)
        if case.save:
            trainer.save_checkpoint(folder / f"{case.name}-{dp}x{cp}.ckpt")
    weights = whole_weights(model) if case.fsdp else model.state_dict()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert weights is not None
    flat = [float(x) for w in weights.values() for x in w.double().flatten()[:: case.every]]
    streams = sorted({module.stream for module in model.modules() if isinstance(module, Dropout)})
    return {
        "losses": losses.found, "weights": flat, "metrics": metrics, "groups": groups() - before, "streams": streams,
    }  # fmt: skip


def groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def sequences(size: int) -> dict[str, list[float]]:
    """What `count_right` finds on the stretches of a group, summed, and in the whole; by layout and packing."""
    made = torch.Generator().manual_seed(5)
    targets = torch.randint(2, (1, 24), generator=made)
    targets[0, 20:] = -100
    wrong = torch.zeros(24, dtype=torch.bool)
    wrong[[4, 17]] = True
    logits = torch.nn.functional.one_hot(torch.where(wrong, 1 - targets, targets).clamp(min=0), 2).double()
    bounds = torch.tensor([0, 3, 3, 8, 16, 19, 24])
    found = {}
    for layout in shard.LAYOUTS:
        for packed in (None, bounds):
            place = shard.SequenceShard(layout=layout, length=24, documents=tuple(bounds.tolist()))
            own = shard.token_indices(24, place.rank, place.size, layout)
            with shard.use(place):
                counts = torch.stack(count_right(logits[:, own], targets[:, own], packed))
            dist.all_reduce(counts)
            found[f"{layout}, {packed is not None}"] = [
                counts.tolist(),
                [int(x) for x in count_right(logits, targets, packed)],
            ]
    return found


def refusal(case: Case, dp: int, cp: int, folder: Path) -> dict[str, Any]:
    """The error's first line, or what was trained."""
    try:
        train(case, dp, cp, folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def process(rank: int, world: int, port: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        for dp, cp in case.layouts:
            if dp * cp == world and not (case.name not in chosen() and chosen()):
                run: Callable[..., dict[str, Any]] = refusal if case.refused else train
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    result = run(case, dp, cp, folder)
                result["told"] = [str(w.message) for w in told if "hybrid" in str(w.message)]
                found.setdefault(case.name, {})[f"{dp}x{cp}"] = result
                if chosen():
                    print(world, rank, case.name, f"{dp}x{cp}", result.get("losses", result.get("error")), flush=True)
    if world > 1 and dist.is_initialized() and not chosen():
        found["sequences"] = {f"1x{world}": sequences(world)}
    (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))


def chosen() -> list[str]:
    return sys.argv[2:]


def main(folder: Path) -> None:
    faulthandler.enable()
    context = multiprocessing.get_context("fork")
    collected: dict[str, dict[str, Any]] = {}
    for world in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=process, args=(r, world, port, folder)) for r in range(world)]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
        assert not any(p.exitcode for p in processes), [p.exitcode for p in processes]
        for rank in range(world):
            for name, layouts in json.loads((folder / f"found-{world}-{rank}.json").read_text()).items():
                for layout, result in layouts.items():
                    collected.setdefault(name, {}).setdefault(layout, []).append(result)
    (folder / "found.json").write_text(json.dumps(collected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
