"""Trainings by plans in worlds of 1 to 4 gloo processes; started by test_balanced.py, as sharded_training.py is.

Writes FOLDER/found.json: {case: {world: [what each rank found]}}; names of cases behind FOLDER choose some.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from balanced_cases import CASES, MODELS, ROOM, Case
from balanced_data import Uneven
from lightning.pytorch import Trainer
from sharded_cases_training import Running
from sharded_data import Data, V
from sharded_training import Losses

from zoo.registry import create_model
from zoo.train.optim import AdamW, Limits
from zoo.train.run.endless_epoch import EndlessData
from zoo.train.run.quiet import quiet_lightning
from zoo.train.strategies import BalancedFSDPStrategy, BalancedStrategy
from zoo.train.strategies.balanced import Balanced, Local
from zoo.train.strategies.fsdp import whole_weights
from zoo.train.tasks.language_modelling import LanguageModelling

HANGS_AFTER = 150  # seconds; then every process says where it stands
TIMEOUT = 40.0  # of a lost rank
OURS: dict[str, Any] = {"balanced": BalancedStrategy, "balanced_fsdp": BalancedFSDPStrategy}


class Watch(Losses):
    """Losses, and what each batch was: [(ranks of the ring, tokens here) of each micro-step]."""

    def __init__(self, killed_at: int | None) -> None:
        super().__init__()
        self.steps: list[list[tuple[int, int]]] = []
        self.killed_at = killed_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Local):
            self.steps.append([(len(step.ring), step.tokens) for step, _, _ in batch])
        if batch_idx == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(case: Case, world: int, rank: int, folder: Path) -> dict[str, Any]:
    """One fit."""
    torch.manual_seed(0)
    name, fields = MODELS[case.model]
    model = create_model(name, "tiny", **{"vocab_size": V, **fields}) if name else Running()
    if case.double:
        model = model.double()
    wrong = case.broken if rank == 1 else ""
    data = Data(rows=2, length=16) if case.ordinary else Uneven(differ=wrong == "another document", **case.data)
    task = LanguageModelling(model, AdamW(lr=0.02, warmup_steps=1), Limits(max_steps=100), data)
    strategy: Any = case.strategy
    if case.strategy in OURS:
        settings = {"capacity": ROOM[world], "timeout": TIMEOUT, **case.settings}
        if wrong == "other settings":
            settings["method"] = "lasp"
        strategy = OURS[case.strategy](**settings)
    fsdp = case.strategy == "balanced_fsdp"
    watch = Watch(4 if case.killed and rank == world - 1 else None)
    with ExitStack() as stack:
        stack.enter_context(quiet_lightning())
        if case.broken == "dropped":
            stack.enter_context(mock.patch.object(Balanced, "_place", return_value=None))
        if case.broken == "turned round":
            place = Balanced._place
            turned = lambda self, step: place(self, replace_ring(step))
            stack.enter_context(mock.patch.object(Balanced, "_place", turned))
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy=strategy, max_steps=case.steps, max_epochs=-1,
            precision="bf16-mixed" if not case.double else "32-true" if fsdp else "64-true", gradient_clip_val=0.3,
            accumulate_grad_batches=2, use_distributed_sampler=False, inference_mode=False, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[watch], default_root_dir=folder, val_check_interval=2 * case.steps, check_val_every_n_epoch=None,
            limit_val_batches=0 if case.broken else 1.0,
        )  # fmt: skip
        resumed = folder / f"{case.resume}.ckpt" if case.resume else None
        trainer.fit(task, datamodule=EndlessData(data), ckpt_path=resumed)
        if case.save:
            trainer.save_checkpoint(folder / f"{case.name}-{world}.ckpt")
    weights = whole_weights(model) if fsdp else model.state_dict()
    assert weights is not None
    return {
        "losses": watch.found,
        "weights": [float(x) for w in weights.values() for x in w.double().flatten()],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "steps": watch.steps,
        "tokens": int(task._units),
        "drawn": int(torch.randint(2**62, ())),
    }


def replace_ring(step: Any) -> Any:
    return step._replace(ring=step.ring[::-1])


def outcome(case: Case, world: int, rank: int, folder: Path) -> dict[str, Any]:
    """What was trained, or the error's words where one is expected."""
    if not case.refused:
        return train(case, world, rank, folder)
    try:
        train(case, world, rank, folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def process(rank: int, world: int, port: int, folder: Path, chosen: list[Case]) -> None:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for case in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[case.name] = outcome(case, world, rank, folder)
        if sys.argv[2:]:
            print(world, rank, case.name, found[case.name].get("error", found[case.name].get("losses")), flush=True)
        (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    faulthandler.enable()
    context = multiprocessing.get_context("fork")
    collected: dict[str, dict[str, list[Any]]] = {}
    cases = [case for case in CASES if not sys.argv[2:] or case.name in sys.argv[2:]]
    groups = [(w, [c for c in cases if w in c.worlds and c.killed == k]) for w in (1, 2, 3, 4) for k in (False, True)]
    for world, chosen in groups:
        if not chosen:
            continue
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=process, args=(r, world, port, folder, chosen)) for r in range(world)]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
        codes = [p.exitcode for p in processes]
        lost = int(chosen[0].killed)
        assert codes == [0] * (world - lost) + [-signal.SIGKILL] * lost, (world, codes)
        for rank in range(world - lost):
            for name, result in json.loads((folder / f"found-{world}-{rank}.json").read_text()).items():
                collected.setdefault(name, {}).setdefault(str(world), []).append(result)
    (folder / "found.json").write_text(json.dumps(collected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
