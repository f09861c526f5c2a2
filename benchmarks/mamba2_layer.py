"""How fast is Mamba-2's layer on a CPU beside transformers' torch path, and how fast is the operator inside it?

Same weights, same input, forward and backward from a fixed gradient; outputs and gradients are compared before anything
is timed. Both take turns; times are CPU times of the process on one thread, so that other load meets both and counts
for neither. Shapes: a layer of the 130m model.

    python benchmarks/mamba2_layer.py [--length 1024] [--batch 1] [--rounds 9]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2

from zoo.layers import Mamba2
from zoo.ops import ssd

D, N, P = 768, 128, 64
H = 2 * D // P


def layers() -> tuple[Mamba2, torch.nn.Module]:
    """Ours and theirs with the same weights."""
    config = transformers.Mamba2Config(
        hidden_size=D, state_size=N, head_dim=P, num_heads=H, n_groups=1, expand=2, num_hidden_layers=1
    )
    theirs = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2(D, d_state=N, head_dim=P)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours.get_parameter(name).view_as(parameter))
    return ours, theirs


def step(run: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = run()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def compare(ours: Callable[[], list[Tensor]], theirs: Callable[[], list[Tensor]], rounds: int) -> dict[str, Any]:
    """The largest relative difference, then CPU seconds in turns."""
    error = max(((a.view_as(b) - b).norm() / b.norm()).item() for a, b in zip(ours(), theirs(), strict=True))
    assert error < 1e-4, f"they do not compute the same: relative error {error:.1e}"
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        pair = []
        for run in (ours, theirs):
            start = time.process_time()
            run()
            pair.append(time.process_time() - start)
        times.append((pair[0], pair[1]))
    ratios = sorted(b / a for a, b in times[1:])
    return {
        "theirs over ours, median": round(statistics.median(ratios), 2),
        "from": round(ratios[0], 2),
        "to": round(ratios[-1], 2),
        "ours, CPU ms": round(1e3 * statistics.median(a for a, _ in times[1:])),
        "theirs, CPU ms": round(1e3 * statistics.median(b for _, b in times[1:])),
        "largest relative difference": float(f"{error:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    B, T = args.batch, args.length

    ours, theirs = layers()
    x, dy = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    names = [name for name, _ in theirs.named_parameters()]
    own, other = ([x, *(layer.get_parameter(name) for name in names)] for layer in (ours, theirs))
    layer = compare(lambda: step(lambda: ours(x)[0], own, dy), lambda: step(lambda: theirs(x), other, dy), args.rounds)

    u, b, c = torch.randn(B, T, H, P), torch.randn(B, T, 1, N), torch.randn(B, T, 1, N) * N**-0.5
    dt, a, skip = F.softplus(torch.randn(B, T, H) - 4), -torch.rand(H) * 15 - 1, torch.ones(H)
    leaves = [z.requires_grad_() for z in (u, dt, a, b, c, skip)]
    du = torch.randn(B, T, H, P)
    operator = compare(
        lambda: step(lambda: ssd(*leaves)[0], leaves, du),
        lambda: step(lambda: modeling_mamba2.mamba2_chunk_scan(u, dt, a, b, c, 256, D=skip), leaves, du),
        args.rounds,
    )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"layer": layer, "operator": operator, "B": B, "T": T, **versions}, indent=1))


if __name__ == "__main__":
    main()
