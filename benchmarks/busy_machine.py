"""Training steps on a CPU that others use, too: how long waiting threads spin, and how many there are.

Every side is a process of its own with its own OMP_* settings, since an OpenMP runtime reads them once, when torch is
loaded. The sides take turns, one at a time, beside as many busy loops as --loads says. Tokens per second on the wall,
medians over the rounds, and the median over the rounds of the speed divided by that of one thread in the same round.
The side that watches the machine takes the other sides' turns for disturbance, too.

    python benchmarks/busy_machine.py [--model deltanet] [--loads 0 1 2 4] [--rounds 7] [--steps 2] [--spins ...]
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time

import torch

from zoo.bench.steps import ModelRequest, StepBench
from zoo.cli.spins import SpinWatch
from zoo.cli.threads import QUIET, SHARED, VARIABLE
from zoo.config import compose

ONE, DEFAULT = "one thread", "all threads, the runtime's default"
WATCHED = f"all threads, {QUIET} spins, fewer beside others"  # as a run of `zoo train` that began on a quiet machine
BUSY = [sys.executable, "-c", "while True: pass"]


def serve(model: str, steps: int, *, watched: bool) -> None:
    """In a side's process: a burst of steps for every line of the input; answers with tokens per second."""
    bench = StepBench(ModelRequest(compose([f"model={model}"])))
    batch = bench.next_batch()
    bench.step(batch)
    print(torch.get_num_threads(), flush=True)
    with SpinWatch() if watched else contextlib.nullcontext():
        for _ in sys.stdin:
            start = time.perf_counter()
            for _ in range(steps):
                bench.step(batch)
            print(steps * batch["tokens"].numel() / (time.perf_counter() - start), flush=True)


def start(args: argparse.Namespace, settings: dict[str, str], *, watched: bool) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    words = [sys.executable, __file__, "--model", args.model, "--steps", str(args.steps), "--serve"]
    words += ["--watched"] if watched else []
    return subprocess.Popen(
        words, env={**environment, **settings}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def ask(side: "subprocess.Popen[str]") -> float:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("go\n")
    side.stdin.flush()
    return float(side.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deltanet")
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 2, 4], help="busy loops beside it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--spins", type=int, nargs="*", default=[SHARED, QUIET], help="sides: libgomp's GOMP_SPINCOUNT")
    parser.add_argument("--no-default", action="store_true", help="leave the runtime's default out: it takes long")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.steps, watched=args.watched)
        return
    print(f"{args.model}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} before")
    sides = {}
    settings = {ONE: {"OMP_NUM_THREADS": "1"}, **({} if args.no_default else {DEFAULT: {}})}
    settings |= {f"all threads, {count} spins": {VARIABLE: str(count)} for count in args.spins}
    settings[WATCHED] = {VARIABLE: str(QUIET)}
    for name, value in settings.items():
        sides[name] = start(args, value, watched=name == WATCHED)
        assert sides[name].stdout is not None
        print(f"{name}: {sides[name].stdout.readline().strip()} threads", flush=True)  # and it is warm
    try:
        for load in args.loads:
            others = [subprocess.Popen(BUSY) for _ in range(load)]
            try:
                speeds: dict[str, list[float]] = {name: [] for name in sides}
                for number in range(args.rounds):
                    for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                        speeds[name].append(ask(sides[name]))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            for name, each in speeds.items():
                ratio = statistics.median(a / b for a, b in zip(each, speeds[ONE], strict=True))
                print(
                    f"{load} busy loops, {name}: {statistics.median(each):.0f} tokens/s ({min(each):.0f} to "
                    f"{max(each):.0f}), {ratio:.2f} of one thread",
                    flush=True,
                )
    finally:
        for side in sides.values():
            side.kill()
            side.wait()


if __name__ == "__main__":
    main()
