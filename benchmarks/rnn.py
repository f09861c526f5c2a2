"""The recurrent operators on this machine: our torch form against the loop of the definition, and against
torch.nn.LSTM, GRU and RNN, a module for each head.

torch's modules include their input projection: they are given inputs of width 1, so that it costs next to nothing. The
sides take turns, the first round warms up; medians, ratio first. The loop is compared before it is timed,
torch's modules in tests/ops/test_rnn.py.

    OMP_NUM_THREADS=1 python benchmarks/rnn.py [--lengths 512 2048] [--batch 8] [--heads 4] [--dim 32] [--rounds 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ops import elman, gru, lstm, slstm

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OPERATORS: dict[str, tuple[Callable[..., Any], int, int, int]] = {  # x's gates, R's, b's
    "lstm": (lstm, 4, 4, 4),
    "gru": (gru, 3, 3, 4),
    "elman": (elman, 1, 1, 1),
    "slstm": (slstm, 4, 4, 4),
}
MODULES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}
Call = Callable[[], Tensor]


def ours(name: str, args: argparse.Namespace, T: int, heads: int, dim: int, backend: str) -> tuple[Call, list[Tensor]]:
    function, given, recurrent, gates = OPERATORS[name]
    torch.manual_seed(0)
    x = torch.randn(args.batch, T, given, heads, dim, requires_grad=True)
    R = (torch.randn(recurrent, heads, dim, dim) * dim**-0.5).requires_grad_()
    b = torch.zeros(gates, heads, dim, requires_grad=True)
    return lambda: function(x, R, b, backend=backend)[0], [x, R, b]


def theirs(name: str, args: argparse.Namespace, T: int, heads: int, dim: int) -> tuple[Call, list[Tensor]]:
    """A module a head."""
    modules = [MODULES[name](1, dim, batch_first=True) for _ in range(heads)]
    x = torch.randn(args.batch, T, 1, requires_grad=True)
    leaves = [x, *(p for module in modules for p in module.parameters())]
    return lambda: torch.stack([module(x)[0] for module in modules], dim=2), leaves


def timed(sides: dict[str, tuple[Call, list[Tensor]]], args: argparse.Namespace, backward: bool) -> dict[str, float]:
    now = CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.rounds + 1):
        for side, (call, leaves) in sides.items():
            start = now()
            if backward:
                torch.autograd.grad(call().sum(), leaves)
            else:
                with torch.no_grad():
                    call()
            if turn:
                seconds[side].append(now() - start)
    return {side: statistics.median(times) for side, times in seconds.items()}


def report(what: str, times: dict[str, float]) -> None:
    (_, mine), *others = times.items()
    ratios = ", ".join(f"{seconds / mine:.2f} times as fast as {side}" for side, seconds in others)
    print(f"{what}: {ratios} ({', '.join(f'{side} {1e3 * s:.4g} ms' for side, s in times.items())})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, float32, B={args.batch}, {args.clock} clock, {args.rounds} rounds")
    for name in OPERATORS:
        for T in args.lengths:
            loops = {side: ours(name, args, T, args.heads, args.dim, side) for side in ("torch", "reference")}
            torch.testing.assert_close(loops["torch"][0](), loops["reference"][0](), rtol=1e-4, atol=1e-4)
            sides = {f"{args.heads} heads of {args.dim}": loops}
            if name in MODULES:
                for heads, dim in ((args.heads, args.dim), (1, args.heads * args.dim)):
                    sides[f"{heads} heads of {dim} and torch.nn"] = {
                        "zoo": ours(name, args, T, heads, dim, "torch"),
                        f"nn.{MODULES[name].__name__}": theirs(name, args, T, heads, dim),
                    }
            for label, pair in sides.items():
                for kind in ("forward", "forward + backward"):
                    report(f"{name} T={T}, {kind}, {label}", timed(pair, args, kind != "forward"))


if __name__ == "__main__":
    main()
