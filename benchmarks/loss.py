"""The loss fused with the head against logits in memory: time and extra memory of forward and backward.

The sides take turns; memory is measured in a process of its own for each, as the rise of its resident memory above what
the inputs and their gradients take.

    python benchmarks/loss.py [--tokens 4096] [--vocab 50000] [--width 512] [--rounds 7] [--threads N]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from resident import peak, reset
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import linear_cross_entropy


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())


def torchs_own(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=options)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "zoo": linear_cross_entropy}
if hasattr(F, "linear_cross_entropy"):
    SIDES["torch's own"] = torchs_own


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(args.seed)
    x = torch.randn(1, args.tokens, args.width, requires_grad=True)
    weight = (torch.randn(args.vocab, args.width) * args.width**-0.5).requires_grad_()
    return x, weight, torch.randint(args.vocab, (1, args.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("vocab", 50_000), ("width", 512), ("rounds", 7), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=SIDES, help="one pass of one side, its memory as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, weight, targets = inputs(args)
    if args.only is not None:
        gradients = 4 * (x.numel() + weight.numel())  # what they take in any case
        reset()
        before = peak() + gradients
        torch.autograd.grad(SIDES[args.only](x, weight, targets), (x, weight))
        print(json.dumps({"extra_MiB": round((peak() - before) / 2**20)}))
        return

    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(args.rounds + 1):
        for name, side in SIDES.items():
            start = time.perf_counter()
            torch.autograd.grad(side(x, weight, targets), (x, weight))
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    logits = args.tokens * args.vocab * 4
    print(f"logits: {logits / 2**20:.0f} MiB; {args.threads} threads; torch {torch.__version__}; seed {args.seed}")
    for name in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name], check=True, capture_output=True, text=True
        )
        extra = json.loads(done.stdout)["extra_MiB"]
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        print(
            f"{name:12} {ratio:.2f} of plain's time, median {statistics.median(seconds[name]):.2f} s; "
            f"extra memory {extra} MiB, {100 * extra * 2**20 / logits:.1f} % of the logits"
        )


if __name__ == "__main__":
    main()
