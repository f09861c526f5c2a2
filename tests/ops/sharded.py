"""Four gloo processes that compare sequences cut across ranks with whole ones; started as a script by test_shard.py.

Called with FOLDER, a suite and, to look closer, a part of the names of its checks. Groups of 1 to 4 ranks are made of
the same four processes, so that everything costs one start. Writes FOLDER/errors.json: {ranks: {check: {what: worst
relative error on any rank}}}.
"""

import faulthandler
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharded_attention
import sharded_chunks
import sharded_folds
import sharded_frontiers
import sharded_memories
import sharded_methods as methods
import sharded_models
import sharded_sides
import torch
import torch.distributed as dist
from sharded_cases import LAYOUTS, Errors, model, operator, recomputation_sends_nothing, refusals, without

from zoo.ops import shard
from zoo.ops.core.table import OPERATORS

RANKS = 4
HANGS_AFTER = 1200  # seconds, of which a loaded machine takes 450 for the models;


def checks() -> dict[str, Callable[[shard.SequenceShard], Errors]]:
    """Names that start with "dropped" must fail on more than one rank."""
    made: dict[str, Callable[[shard.SequenceShard], Errors]] = {}
    for name, spec in OPERATORS.items():
        if spec.summary is None and not spec.iterated and not spec.both_sides:
            continue
        for layout in LAYOUTS:
            made[f"{name}, {layout}"] = lambda place, s=spec, lay=layout: operator(place, s, lay)
            if spec.state is not None:
                made[f"{name}, {layout}, no state"] = (
                    lambda place, s=spec, lay=layout: operator(place, s, lay, given=False)
                )  # fmt: skip
            for length in (6, 3):  # stretches shorter than the convolution, and ranks without a token
                made[f"{name}, {layout}, {length}"] = (
                    lambda place, s=spec, lay=layout, n=length: operator(place, s, lay, length=n)
                )  # fmt: skip
        if spec.summary is not None:
            made[f"{name}, reference"] = lambda place, s=spec: operator(place, s, "one long document", "reference")
        made[f"dropped {name}"] = lambda place, s=spec: operator(place, s, "batch", given=False, within=without)
    for name in ("deltanet", "gated_deltanet", "gla"):
        for layout in LAYOUTS if name != "gated_deltanet" else ["borders at edges"]:
            made[f"model {name}, {layout}"] = lambda place, n=name, lay=layout: model(place, n, lay)
        made[f"dropped model {name}"] = lambda place, n=name: model(place, n, "batch", within=without)
    made["model gla with convolutions"] = lambda place: model(place, "gla", "one long document", conv_size=4)
    made["model deltanet, recomputed"] = lambda place: model(place, "deltanet", "borders at edges", recompute=True)
    made["recomputation"] = recomputation_sends_nothing
    made |= methods.checks()
    made |= sharded_sides.checks()
    made["refusals"] = refusals
    return made


def between_pairs() -> dict[str, Callable[[shard.SequenceShard], Errors]]:
    """Ranks without a process group of their own: every way to cross, by messages on the global group."""
    found = sharded_models.checks()
    names = [name for name in found if name.split(",")[0].removeprefix("dropped ") in ("gla", "lstm", "hybrid")]
    ragged = {name: check for name, check in sharded_attention.checks().items() if ", 29, packed True" in name}
    return {name: found[name] for name in names} | ragged


SUITES = {
    "operators": checks,
    "attention": sharded_attention.checks,
    "models": sharded_models.checks,
    "between pairs": between_pairs,
    "folds": sharded_folds.checks,
    "frontiers": sharded_frontiers.checks,
    "chunks": sharded_chunks.checks,
    "memories": sharded_memories.checks,
}


def process(rank: int, folder: Path, suite: str, part: str) -> None:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {size: dist.new_group(range(RANKS - size, RANKS)) for size in range(1, RANKS + 1)}
    found: dict[int, dict[str, Errors]] = {}
    for size, group in groups.items():
        if rank < RANKS - size:
            continue
        place = shard.SequenceShard(group)
        if suite == "between pairs":
            place = shard.SequenceShard(ranks=tuple(range(RANKS - size, RANKS)))
        assert (place.size, place.rank) == (size, rank - (RANKS - size))
        for name, check in SUITES[suite]().items():
            if part not in name:
                continue
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, check(place), group=group)
            worst: Errors = {}
            for errors in everyone:
                for what, error in errors.items():
                    worst[what] = max(error, worst.get(what, 0.0))
            found.setdefault(size, {})[name] = worst
    if rank == RANKS - 1:  # a member of every group
        (folder / "errors.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # what was imported above is there already
    args = Path(sys.argv[1]), sys.argv[2], "".join(sys.argv[3:])
    processes = [context.Process(target=process, args=(rank, *args), daemon=True) for rank in range(RANKS)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    sys.exit(any(p.exitcode for p in processes))
