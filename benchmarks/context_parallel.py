"""Published times of state passing beside what `zoo.bench.context_parallel` predicts from one link.

    python benchmarks/context_parallel.py [PLOT.png]

Two numbers describe the link: latency and bandwidth, fitted to the operator table of ZeCO (arXiv 2507.01004: all-gather
and All-Scan of one layer's states, H100). Everything else is predicted with them. LASP-2's table (arXiv 2502.07563,
A100) is a shape to compare, since its link is another.
"""

import itertools
import sys

from zoo.bench.context_parallel import Exchange, seconds_of
from zoo.ops.shard import Link

# ranks: (all-gather, All-Scan) in ms; 32 heads of 128 x 128 in float32
COLLECTIVES = {8: (0.375, 0.226), 16: (0.658, 0.297), 32: (1.616, 0.448), 64: (2.543, 0.739), 128: (4.350, 1.272),
               256: (8.514, 2.165)}  # fmt: skip
STATE = 4 * 32 * 128 * 128
# ranks: (LASP-1, LASP-2, ZeCO, data parallel) in tokens/s of one GPU; GLA of 1B, 32k tokens a GPU
TRAINING = {8: (27014, 42946, 47369, 49633), 64: (12268, 37485, 44468, 48230), 128: (None, 33327, 43278, 47848),
            256: (None, 25402, 40967, 46588)}  # fmt: skip
TOKENS, LAYERS, LAYER_STATE = 32768, 24, 4 * 16 * 128 * 128
COLUMNS = 128


def all_gather(ranks: int, size: int, link: Link) -> float:
    return seconds_of(Exchange("allgather", (ranks - 1) * size), ranks, link)


def all_scan(ranks: int, size: int, link: Link) -> float:
    return seconds_of(Exchange("zeco", size, link.blocks(ranks, size, COLUMNS)), ranks, link)


def fit() -> Link:
    """The latency and bandwidth with the least mean square of the logarithms of predicted over published times."""

    def wrong(link: Link) -> float:
        ratios = []
        for ranks, (gathered, scanned) in COLLECTIVES.items():
            ratios += [all_gather(ranks, STATE, link) / gathered * 1e3, all_scan(ranks, STATE, link) / scanned * 1e3]
        return sum((r if r > 1 else 1 / r) ** 2 for r in ratios)

    grid = itertools.product([1.1**i * 1e-6 for i in range(40)], [1.05**i * 1e10 for i in range(60)])
    return min((Link(*point) for point in grid), key=wrong)


def main() -> None:
    link = fit()
    print(f"link: {link.latency * 1e6:.1f} us, {link.bandwidth / 1e9:.1f} GB/s\n")
    print("| GPUs | all-gather ms | predicted | All-Scan ms | predicted | blocks | ratio | predicted |")
    print("|---|---|---|---|---|---|---|---|")
    points = []
    for ranks, (gathered, scanned) in COLLECTIVES.items():
        ours = all_gather(ranks, STATE, link) * 1e3, all_scan(ranks, STATE, link) * 1e3
        points.append((ranks, gathered, ours[0], scanned, ours[1]))
        print(
            f"| {ranks} | {gathered} | {ours[0]:.3f} | {scanned} | {ours[1]:.3f} | "
            f"{link.blocks(ranks, STATE, COLUMNS)} | {gathered / scanned:.2f} | {ours[0] / ours[1]:.2f} |"
        )
    print("\n| GPUs | LASP-1 | predicted | LASP-2 | predicted | ZeCO | predicted | data parallel |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks, (lasp, lasp2, zeco, alone) in TRAINING.items():
        local = TOKENS / alone
        chain = seconds_of(Exchange("lasp", LAYER_STATE), ranks, link)
        exposed = [2 * LAYERS * t for t in (chain, all_gather(ranks, LAYER_STATE, link))]
        exposed.append(2 * LAYERS * all_scan(ranks, LAYER_STATE, link))
        speeds = [f"{TOKENS / (local + t):,.0f}" for t in exposed]
        published = ["out of memory" if x is None else f"{x:,}" for x in (lasp, lasp2, zeco)]
        cells = [x for pair in zip(published, speeds, strict=True) for x in pair]
        print(f"| {ranks} | {' | '.join(cells)} | {alone:,} |")
    if len(sys.argv) > 1:
        draw(points, sys.argv[1])


def draw(points: list[tuple[int, float, float, float, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks, gathered, ours_gathered, scanned, ours_scanned = zip(*points, strict=True)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for published, ours, name, colour in (
        (gathered, ours_gathered, "all-gather", "tab:orange"), (scanned, ours_scanned, "All-Scan", "tab:blue")
    ):  # fmt: skip
        axes.loglog(ranks, published, "o", color=colour, label=f"{name}, published")
        axes.loglog(ranks, ours, "-", color=colour, label=f"{name}, predicted")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("ms for the states of one layer")
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
