"""Three gloo processes of which one holds no token; started as a script by test_empty_stretches.py.

Called with FOLDER and, to look closer, a part of the names of operators. Writes FOLDER/errors.json: {check: {what:
worst relative error on any rank}}.
"""

import json
import multiprocessing
import sys
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import running_average
import torch
import torch.distributed as dist
from sharded_cases import like, remembering, summed
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.spec import OperatorSpec, relative_error
from zoo.ops.core.table import OPERATORS as REGISTERED

OPERATORS = REGISTERED | {running_average.SPEC.name: running_average.SPEC}
LENGTHS = ((5, 0, 6), (0, 5, 6), (5, 6, 0))
WAITS = timedelta(seconds=60)  # for a message; who waits for a rank that left the graph fails then


def pair(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(y, state), an empty one where there is none."""
    y, *state = outputs
    return y, state[0] if state else y.new_zeros(0)


def check(place: shard.SequenceShard, spec: OperatorSpec, lengths: tuple[int, ...]) -> dict[str, float]:
    """Outputs, the final state and all gradients against the run in one piece, without a state at the beginning."""
    inputs = spec.without_state(remembering(spec.inputs(2, sum(lengths))))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, after = pair(spec.run(leaves, backend="torch"))
    dy, dafter = like(y, 1), like(after, 2)
    whole = torch.autograd.grad((y * dy).sum() + (after * dafter).sum(), list(leaves.values()))

    left, right = list(pairwise(accumulate(lengths, initial=0)))[place.rank]
    own = {name: x[:, left:right] if name in spec.time else x for name, x in leaves.items()}
    with shard.use(place):
        y_, after_ = pair(spec.run(own, backend="torch"))
    errors = {"output": relative_error(y_, y[:, left:right])}
    loss = (y_ * dy[:, left:right]).sum()
    if after.numel() and place.rank == place.size - 1:
        loss = loss + (after_ * dafter).sum()
        errors["state"] = relative_error(after_, after)
    parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    errors["missing"] = float(sum(x is None for x in parts))  # an optimiser would pass this rank's parameter over
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), parts, strict=True)]
    for name, ours, exact in zip(leaves, summed(place, full), whole, strict=True):
        errors[f"d {name}"] = relative_error(ours, exact)
    return errors


def process(rank: int, folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    size = len(LENGTHS[0])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=WAITS)
    place = shard.SequenceShard(dist.group.WORLD)
    worst: dict[str, dict[str, float]] = {}
    for name, spec in OPERATORS.items():
        if spec.cp_kind in ("local", "attention") or part not in name:  # attention asks for even slices
            continue
        for lengths in LENGTHS:
            if rank == 0:
                print(name, lengths, file=sys.stderr, flush=True)
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, check(place, spec, lengths))
            worst[f"{name}, {lengths}"] = {
                what: max(errors.get(what, 0.0) for errors in everyone) for what in everyone[-1] | everyone[0]
            }
    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(worst))
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # what was imported above is there already
    args = Path(sys.argv[1]), "".join(sys.argv[2:])
    processes = [context.Process(target=process, args=(rank, *args), daemon=True) for rank in range(len(LENGTHS[0]))]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    sys.exit(any(p.exitcode for p in processes))
