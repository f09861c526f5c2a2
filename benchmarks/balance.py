"""What do plans for sequences of uneven lengths gain over groups of one size? On paper, by published coefficients.

Two tables. The first prices plans for batches of documents on 64 GPUs by FlexSP's coefficients of a 7B transformer,
against static groups, the best size of each batch and a bound below which no plan in lockstep can be. The second lets
the context grow on 1,024 ranks with rings, as ByteScale does.

    python benchmarks/balance.py [--batches 12] [--sequences 512] [--seed 0] [--lengths FILE] [--only first|second]

FILE holds lengths separated by white space, such as the ones that FlexSP's authors published (wikipedia.txt).
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from balancing.lengths import CORPORA, power_tail
from balancing.published import PARAMETERS_7B_384K, PUBLISHED
from balancing.simulate import lower_bound, simulate

from zoo.train.balance import CostModel, Flexible, Hybrid, Plan, Planner, RingTraffic, Uniform
from zoo.train.balance.assignment import partitions, powers_of_two

RANKS = 64


def planned(planner: Planner, lengths: np.ndarray, cost: CostModel) -> tuple[float, float]:
    """Milliseconds of a checked plan, and CPU seconds of planning."""
    start = time.process_time()
    plan: Plan = planner(lengths)
    spent = time.process_time() - start
    plan.check(cost.capacity)
    return simulate(plan, cost).milliseconds, spent


def first(batches: int, sequences: int, seed: int, file: Path | None) -> None:
    """Batches of documents on 64 GPUs."""
    print(
        f"7B on {RANKS} GPUs, {batches} batches of {sequences} sequences, seed {seed}; ms of a step, mean over "
        "batches; ratios as mean (largest of any batch)\n"
    )
    print("| lengths | static 64 | best size | Flexible | bound | over static | over best size | above the bound "
          "| Hybrid | CPU s of planning, most |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    draws: list[tuple[str, int, Callable[[np.random.Generator], np.ndarray]]] = []
    if file is not None:
        known = np.array(file.read_text().split(), np.int64)
        known = known[known <= 192 * 1024]
        draws.append((file.name, 192, lambda rng: rng.choice(known, sequences)))
    else:
        for name, k in (*((name, 192) for name in CORPORA), ("wikipedia", 384), ("prolong-512k", 384)):
            draws.append((name, k, lambda rng, n=name, k=k: CORPORA[n].sample(sequences, rng, k * 1024)))
    partitions(RANKS)
    for name, k, draw in draws:
        cost = PUBLISHED["7b"].cost(RANKS, PARAMETERS_7B_384K if k == 384 else None)
        rng, rows, spent = np.random.default_rng(seed), [], 0.0
        for _ in range(batches):
            s = draw(rng)
            found = [
                planned(p, s, cost)
                for p in (Uniform(RANKS, cost, RANKS), Uniform(RANKS, cost), Flexible(RANKS, cost), Hybrid(RANKS, cost))
            ]
            bound = lower_bound(s, cost, RANKS, degrees=powers_of_two(RANKS), lockstep=True)
            rows.append([*(ms for ms, _ in found), bound])
            spent = max(spent, found[2][1])
        static, size, ours, hybrid, bounds = np.array(rows).T
        print(
            f"| {name}, {k}K | {static.mean():.0f} | {size.mean():.0f} | {ours.mean():.0f} | {bounds.mean():.0f} "
            f"| {static.mean() / ours.mean():.2f}x ({(static / ours).max():.2f}x) "
            f"| {size.mean() / ours.mean():.2f}x ({(size / ours).max():.2f}x) "
            f"| {100 * (ours.mean() / bounds.mean() - 1):.0f} % | {hybrid.mean():.0f} | {spent:.2f} |",
            flush=True,
        )


def second(batches: int, seed: int) -> None:
    """Growing contexts on 1,024 ranks."""
    cost = CostModel(
        a1=PUBLISHED["7b"].a1, a2=PUBLISHED["7b"].a2, b1=0.0, capacity=8192, communication=RingTraffic(0.035)
    )  # fmt: skip
    print(f"\n32M tokens on 1,024 ranks of 8K, rings, {batches} batches, seed {seed}; seconds of a step, mean\n")
    print("| context | static | Hybrid by tokens | Hybrid by time | bound | gains | CPU s of planning, most |")
    print("|---|---|---|---|---|---|---|")
    for cap in (2**18, 2**19, 2**20, 2**21):
        rows, spent = [], 0.0
        for s in power_tailed(batches, seed, cap):
            planners = (
                Uniform(1024, cost, cap // 8192, tries=0), Hybrid(1024, cost, balance="tokens"), Hybrid(1024, cost),
            )  # fmt: skip
            found = [planned(p, s, cost) for p in planners]
            rows.append(
                [*(ms for ms, _ in found), lower_bound(s, cost, 1024, degrees=range(1, 1025), lockstep=False)]
            )  # fmt: skip
            spent = max(spent, found[2][1])
        static, tokens, ours, bound = np.array(rows).mean(axis=0) / 1e3
        print(
            f"| {cap // 1024}K | {static:.1f} | {tokens:.1f} | {ours:.1f} | {bound:.1f} "
            f"| 1 / {static / tokens:.1f} / {static / ours:.1f} | {spent:.1f} |",
            flush=True,
        )


def power_tailed(batches: int, seed: int, cap: int) -> Iterator[np.ndarray]:
    """Batches of 32M tokens, of the same draws for every cap."""
    for i in range(batches):
        s = power_tail(20_000, np.random.default_rng([seed, i]), cap)
        yield s[: np.searchsorted(np.cumsum(s), 32e6) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--only", choices=["first", "second"])
    args = parser.parse_args()
    if args.only != "second":
        first(args.batches, args.sequences, args.seed, args.lengths)
    if args.only != "first" and args.lengths is None:
        second(args.batches, args.seed)


if __name__ == "__main__":
    main()
