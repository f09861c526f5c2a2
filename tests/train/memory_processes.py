"""Two processes: memory plans under DistributedDataParallel and under a sequence shard. Writes found.json."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import zoo
from zoo.layers.memory import MemoryPlan
from zoo.ops import shard

PLANS = (
    MemoryPlan(),
    MemoryPlan(recompute="block", tile_mlp=3),
    MemoryPlan(recompute="mixer_saved", tile_mlp=3),
    MemoryPlan(recompute="mixer_saved"),
)


def model() -> Any:
    torch.manual_seed(0)
    return zoo.create_model(
        "deltanet", d_model=16, n_layers=2, n_heads=2, hidden_size=24, vocab_size=11, init_std=0.3
    ).double()


def distance(a: Any, b: Any) -> float:
    return max(float((x - y).norm() / y.norm().clamp(min=1e-9)) for x, y in zip(a, b, strict=True))


def under_ddp(rank: int) -> dict[str, float]:
    """Relative distance of the averaged gradients from those of one process with the whole batch."""
    tokens = torch.randint(11, (4, 21), generator=torch.Generator().manual_seed(1))
    whole = model()
    whole(tokens)[0].sin().sum().div(2).backward()
    found = {}
    for plan in PLANS:
        ours = model()
        ours.use_memory(plan)
        ddp = DistributedDataParallel(ours)
        ddp(tokens[2 * rank : 2 * rank + 2])[0].sin().sum().backward()
        found[f"{plan.recompute}-{plan.tile_mlp}"] = distance(
            [p.grad for p in ours.parameters()], [p.grad for p in whole.parameters()]
        )
    return found


def under_a_shard(rank: int) -> dict[str, dict[str, float]]:
    """Distance of the gradients summed over ranks from the whole sequence's; and the number of messages."""
    tokens = torch.randint(11, (2, 22), generator=torch.Generator().manual_seed(2))
    whole = model()
    whole(tokens)[0].sin().sum().backward()
    found = {}
    for plan in PLANS:
        ours, count = model(), [0]
        ours.use_memory(plan)
        real = {name: getattr(dist, name) for name in ("all_gather", "isend", "irecv", "batch_isend_irecv")}

        def counted(call: Any, count: list[int] = count) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                count[0] += 1
                return call(*args, **kwargs)

            return run

        for name in ("all_gather", "batch_isend_irecv"):
            setattr(dist, name, counted(real[name]))
        try:
            with shard.use(shard.SequenceShard()):
                logits, _ = ours(tokens[:, 11 * rank : 11 * rank + 11])
            logits.sin().sum().backward()
        finally:
            for name, call in real.items():
                setattr(dist, name, call)
        gradients = [p.grad for p in ours.parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient)
        found[f"{plan.recompute}-{plan.tile_mlp}"] = {
            "gradient": distance(gradients, [p.grad for p in whole.parameters()]),
            "messages": count[0],
        }
    return found


def main(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {"ddp": under_ddp(rank), "shard": under_a_shard(rank)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(main, (str(Path(scratch) / "store"), sys.argv[1]), nprocs=2)
