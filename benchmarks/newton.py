"""ParaGRU and ParaLSTM in parallel over time, against their own loop and torch's GRU and LSTM of the same width.

    ours      zoo.ops.para_gru / para_lstm: Newton's method, or walking, as the width decides
    loop      the definition, one cell a step, with autograd's gradients
    torch     torch.nn.GRU / LSTM on the same inputs: dense recurrence, and its own input products (said apart)
    newton, walk   ours, held to one road

Forward + backward, float32, gates given. The sides take turns in one process; the first round warms up; medians.

    python benchmarks/newton.py [--shapes 1x64 8x256] [--lengths 512 2048 8192] [--threads N] [--rounds 5] [--clock cpu]
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.ops import newton_corrections, para_gru, para_lstm
from zoo.ops.recurrent.para_gru.cell import ParaGRUCell
from zoo.ops.recurrent.para_lstm.cell import ParaLSTMCell

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CELLS: dict[str, tuple[Any, Any, tuple[int, ...], Any]] = {
    "para_gru": (para_gru, ParaGRUCell(), (3,), nn.GRU),
    "para_lstm": (para_lstm, ParaLSTMCell(), (3, 2), nn.LSTM),
}
newton_module = importlib.import_module("zoo.ops.scans.newton_scan")


def sides(name: str, B: int, D: int, T: int, seed: int) -> tuple[dict[str, Callable[[], Any]], list[float]]:
    """What is timed, and Newton's corrections on these inputs."""
    operator, cell, rows, theirs = CELLS[name]
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, 3, D, generator=generator)
    w = [(0.3 * torch.randn(n, D, generator=generator)).clamp(-0.5, 0.5).requires_grad_() for n in rows]
    corrections = newton_corrections(cell, u, [x for part in w for x in part.detach()])
    u.requires_grad_()
    dy = torch.randn(B, T, D, generator=generator)
    dense = theirs(D, D, batch_first=True)
    x = torch.randn(B, T, D, generator=generator, requires_grad=True)

    def ours(wide: float | None = None, backend: str = "auto") -> Any:
        kept = newton_module.WIDE
        newton_module.WIDE = kept if wide is None else wide
        y, _ = operator(u, *w, backend=backend)
        newton_module.WIDE = kept
        return torch.autograd.grad(y, [u, *w], dy)

    def torchs() -> Any:
        y, _ = dense(x)
        return torch.autograd.grad(y, [x, *dense.parameters()], dy)

    return {
        "ours": ours,
        "loop": lambda: ours(backend="reference"),
        "torch": torchs,
        "newton": lambda: ours(float("inf")),
        "walk": lambda: ours(0),
    }, corrections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--shapes", nargs="+", default=["1x64", "1x256", "8x256"], help="batch x width")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{args.threads} threads; {args.clock} time; medians of {args.rounds} rounds; seed {args.seed}; load {load}; "
        f"torch {torch.__version__}; forward + backward, ms\n"
    )
    print("| cell | B | D | T | loop / ours | torch / ours | ours | loop | torch | newton | walk | corrections |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.cells:
        for shape in args.shapes:
            B, D = map(int, shape.split("x"))
            for T in args.lengths:
                runs, corrections = sides(name, B, D, T, args.seed)
                times: dict[str, list[float]] = {side: [] for side in runs}
                for turn in range(args.rounds + 1):
                    for side, run in runs.items():
                        begin = clock()
                        run()
                        if turn:
                            times[side].append(1e3 * (clock() - begin))
                ms = {side: statistics.median(found) for side, found in times.items()}
                needed = next((i + 1 for i, size in enumerate(corrections) if size <= 3e-3), len(corrections))
                print(
                    f"| {name} | {B} | {D} | {T} | {ms['loop'] / ms['ours']:.1f} | {ms['torch'] / ms['ours']:.2f} | "
                    + " | ".join(f"{ms[side]:.0f}" for side in runs)
                    + f" | {needed} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
