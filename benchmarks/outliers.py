"""Streaming linear regression whose values are sometimes hit by large noise: which inner loss a memory survives.

A matrix memory of 32 numbers learns v = M k from 2,000 tokens of unit keys, one update a token, without decay. With
probability 0.05 a value is hit by noise of deviation 20. Every loss gets the best of six step sizes, by its own error.

    python benchmarks/outliers.py [--seeds 3] [--share 0.05]
"""

import argparse
import statistics

import torch
from torch.nn import functional as F

from zoo.ops import HuberLoss, L2Loss, LpLoss, MatrixMemory, MemoryRule, test_time_memory

SIZE, TOKENS, NOISE = 32, 2000, 20.0
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LOSSES = {"l2": L2Loss(), "huber": HuberLoss(), "l1": LpLoss(1.0), "l3": LpLoss(3.0)}


def errors(name: str, share: float, seed: int) -> list[float]:
    """||W - M|| / ||M|| after the last token, for each step size; infinite where it went away."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    k = F.normalize(torch.randn(1, TOKENS, 1, SIZE, generator=generator, dtype=torch.float64), dim=-1)
    hit = torch.rand(1, TOKENS, 1, 1, generator=generator) < share
    v = k @ truth.T + hit * NOISE * torch.randn(1, TOKENS, 1, SIZE, generator=generator, dtype=torch.float64)
    n = len(STEPS)  # the step sizes are rows of one batch
    k, v = (x.expand(n, TOKENS, 1, SIZE) for x in (k, v))
    eta = torch.tensor(STEPS, dtype=torch.float64).view(n, 1, 1).expand(n, TOKENS, 1)
    loss = LOSSES[name]
    delta = torch.ones_like(eta) if loss.thresholded else None
    rule = MemoryRule(memory=MatrixMemory(residual=False, norm=False), loss=loss, chunk_size=1)
    with torch.no_grad():
        _, state = test_time_memory(k, k, v, eta, delta=delta, rule=rule)
    W = state.weights[0][:, 0]
    off = (W - truth).flatten(1).norm(dim=1) / truth.norm()
    return off.nan_to_num(torch.inf, torch.inf).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.05, help="of the values that noise hits")
    options = parser.parse_args()
    print(f"{'loss':6} {'clean':>10} {'hit':>10}   best steps on clean and hit values")
    for name in LOSSES:
        line = []
        for share in (0.0, options.share):
            each = [errors(name, share, seed) for seed in range(options.seeds)]
            mean = [statistics.mean(of_step) for of_step in zip(*each, strict=True)]
            best = min(range(len(STEPS)), key=mean.__getitem__)
            line.append((mean[best], STEPS[best]))
        (clean, a), (hit, b) = line
        print(f"{name:6} {clean:10.2g} {hit:10.2g}   {a:g}, {b:g}")


if __name__ == "__main__":
    main()
