"""How long a sequence trains within a fixed budget on one device, with each memory plan and with memory=auto?

A step is forward, loss, backward and AdamW, one sequence, float32. The estimate proposes a length; a process of its own
measures the step there, as torch.profiler counts allocations, with weights and Adam's state; the length is corrected
until the step fits the budget and fills 97 % of it.

    python benchmarks/longest.py [--model deltanet] [--budget 512MiB] [--layers 12] [--width 256] [--only auto]

With --cp P the sequence is cut over P processes of this machine (gloo, method zeco), each with the budget to itself;
the largest of their peaks counts.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

import zoo
from zoo.bench.measure import peak_bytes
from zoo.layers.memory import MemoryPlan
from zoo.ops import shard
from zoo.train.memory.choose import MemoryConfig, choose, parse_size
from zoo.train.memory.estimate import estimate

SIDES = {
    "plain": MemoryPlan(),
    "tile_mlp=auto": MemoryPlan(tile_mlp="auto"),
    "recompute=mixer_saved": MemoryPlan(recompute="mixer_saved"),
    "recompute=mixer_saved tile_mlp=auto": MemoryPlan(recompute="mixer_saved", tile_mlp="auto"),
    "recompute=block": MemoryPlan(recompute="block"),
    "recompute=block tile_mlp=auto": MemoryPlan(recompute="block", tile_mlp="auto"),
}
AUTO = "memory=auto"
STEP = 64  # tokens: the chunk of most operators


def build(args: argparse.Namespace, device: str = "cpu") -> Any:
    torch.manual_seed(args.seed)
    with torch.device(device):
        return zoo.create_model(
            args.model, d_model=args.width, n_layers=args.layers, vocab_size=257, **json.loads(args.fields)
        )


def plan_of(args: argparse.Namespace, side: str, length: int) -> MemoryPlan:
    """The side's plan; memory=auto looks at the budget."""
    if side in SIDES:
        return SIDES[side]
    auto = MemoryConfig(recompute="auto", offload="auto", tile_mlp="auto", budget=args.budget)
    return choose(build(args, "meta"), 1, length, auto).plan


def measure(args: argparse.Namespace, side: str, length: int) -> dict[str, Any]:
    """One step: the largest peak of its processes, weights and Adam's state included."""
    if args.cp == 1:
        return step_here(args, side, length)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=step_of_rank, args=(rank, folder, queue, args, side, length))
            for rank in range(args.cp)
        ]
        for process in ranks:
            process.start()
        found = [queue.get() for _ in ranks]
        for process in ranks:
            process.join()
    return {**found[0], "tokens": length, "peak": max(x["peak"] for x in found)}


def step_of_rank(rank: int, folder: str, queue: Any, args: argparse.Namespace, side: str, length: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.cp)
    with shard.use(shard.SequenceShard(method="zeco")):
        queue.put(step_here(args, side, length // args.cp))
    dist.barrier()
    dist.destroy_process_group()


def step_here(args: argparse.Namespace, side: str, length: int) -> dict[str, Any]:
    """One step of this process's stretch."""
    plan = plan_of(args, side, length)
    model = build(args)
    model.use_memory(plan)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():  # Adam has its state before the first step that is measured
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = torch.randint(257, (1, length + 1))

    def step() -> None:
        loss = model.head_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:], reduction="sum") / (length * args.cp)
        loss.backward()
        if args.cp > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()

    static = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    start = time.process_time()
    peak = static + peak_bytes(step, torch.device("cpu"))
    return {
        "plan": f"{plan.recompute} {plan.tile_mlp}", "tokens": length, "peak": peak,
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def proposed(args: argparse.Namespace, side: str, budget: int) -> int:
    """The longest sequence by the estimate, which is affine in the length."""
    model, found = build(args, "meta"), []
    for plan in SIDES.values() if side == AUTO else (SIDES[side],):
        short, long = (estimate(model, 1, T, plan).peak for T in (8192, 16384))
        found.append(8192 + (budget - short) * 8192 / (long - short))
    step = STEP * args.cp
    return max(step, int(args.cp * max(found)) // step * step)


def child(side: str, length: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side, "--length", str(length)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def longest(args: argparse.Namespace, side: str, budget: int) -> dict[str, Any]:
    """The measured length that fits, as close to the budget as 3 % or one step."""
    length, fits, fails = proposed(args, side, budget), None, None
    for _ in range(8):
        found = child(side, length)
        if found["peak"] <= budget:
            fits = found
            if found["peak"] > 0.97 * budget or fails == length + STEP * args.cp:
                break
        else:
            fails = length
        static = 12 * args.parameters
        step = STEP * args.cp
        length = int(length * (budget * 0.985 - static) / (found["peak"] - static)) // step * step
    assert fits is not None, found
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deltanet")
    parser.add_argument(
        "--fields", default='{"n_heads": 4, "hidden_size": null}', help="further fields of its config, JSON"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--only", choices=[*SIDES, AUTO], nargs="+", default=[*SIDES, AUTO])
    parser.add_argument("--cp", type=int, default=1, help="processes that share the sequence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=[*SIDES, AUTO], help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side is not None:
        print(json.dumps(measure(args, args.side, args.length)))
        return
    budget = parse_size(args.budget)
    args.parameters = sum(p.numel() for p in build(args, "meta").parameters())
    parts = f"{args.model}, {args.parameters:,} parameters, {args.budget}, {args.cp} ranks"
    print(f"{parts}; torch {torch.__version__}, seed {args.seed}", flush=True)
    first = None
    for side in args.only:
        found = longest(args, side, budget)
        first = first or found["tokens"]
        tokens = found["tokens"]
        guess = estimate(build(args, "meta"), 1, tokens // args.cp, plan_of(args, side, tokens // args.cp)).peak
        print(
            f"{side:38} {tokens:7} tokens, {tokens / first:5.1f} times; {found['peak'] / 2**20:6.0f} MiB measured, "
            f"{guess / 2**20:6.0f} estimated; {1e3 * found['cpu_seconds'] / tokens:.2f} ms a token ({found['plan']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
