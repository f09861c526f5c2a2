"""Codecs of actions on the demonstrations of data=reaching: tokens, errors and time; and policies trained with them.

    python benchmarks/action_codecs.py [--seed 0] [--runs RUN RUN ...]

`replay` is the share of 300 episodes that succeed when the expert's own chunks go through the codec, the first half of
each executed. A run is the folder of `zoo train`; its policy is measured in 200 episodes, one after the other robot for
`ms/chunk` and `actions/s`: what one robot waits for, decoding included. Every chunk gives `execute` actions.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.layers.policy import Policy
from zoo.train.data.robots.reaching import Reaching
from zoo.train.run.folder import RunFolder
from zoo.train.tasks.trials import run_trials

CODECS: dict[str, dict[str, Any]] = {
    "bspline, N = 5": {"codec": "bspline"},
    "bspline, N = 10": {"codec": "bspline", "n_controls": 10},
    "fast": {"codec": "fast"},
    "bins": {"codec": "bins"},
}
EPISODES, TRIALS, EXECUTE = 300, 200, 10


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def replay(data: Reaching) -> float:
    """The success of the expert's chunks behind the codec."""
    world, state = data.world, data.world.begin(data.trial_beginnings(EPISODES))
    for _ in range(world.horizon // EXECUTE):
        ahead, chunk = state, []
        for _ in range(data.chunk):
            chunk.append(world.expert(ahead))
            ahead = world.step(ahead, chunk[-1])
        rows = data.tokens.targets(list(torch.stack(chunk, 1))).clamp(min=0)
        for actions in data.tokens.decode(rows).actions[:, :EXECUTE].float().unbind(1):
            state = world.step(state, actions)
    return float(world.succeeded(state).float().mean())


def codec_row(settings: dict[str, Any], seed: int) -> list[str]:
    """The numbers of one codec on the demonstrations of validation."""
    data = Reaching(seed=seed, **settings)
    chunks = list(data.sources[1].actions)  # type: ignore[attr-defined]
    tokens, codec = data.tokens, data.codec
    used = (tokens.targets(chunks) >= 0).sum(1).float()
    errors = torch.stack(codec.decode(codec.encode(chunks))) - torch.stack(chunks)
    speeds, gripper = (float(part.square().mean().sqrt()) for part in (errors[..., :2], errors[..., 2]))
    rows = tokens.targets(chunks[:64]).clamp(min=0)
    return [
        f"{used.mean():.1f} ({int(used.min())} to {int(used.max())})",
        f"{tokens.vocab_size}",
        f"{speeds:.4f}",
        f"{gripper:.4f}",
        f"{milliseconds(lambda: tokens.targets(chunks[:64])) / 64 * 1000:.0f}",
        f"{milliseconds(lambda: tokens.decode(rows)) / 64 * 1000:.0f}",
        f"{replay(data):.3f}",
    ]


def run_row(folder: Path) -> list[str]:
    """The numbers of the policy of a finished run."""
    config = RunFolder.existing(folder).read_config()
    settings = {key: value for key, value in config["data"].items() if key not in ("_target_", "codec")}
    settings["seed"] = config["seed"]
    model, data = zoo.load(folder), Reaching(codec=str(RunFolder.existing(folder).final), **settings)
    assert isinstance(model, Policy)
    with torch.no_grad():
        tried = run_trials(model.act, data.world, data.tokens, data.trial_beginnings(TRIALS), EXECUTE)
        seen = data.sources[1].batch(0, 0, 0, 1)["observations"]
        waits = [milliseconds(lambda row=row: decode(model, data, row), 5) for row in seen[:20].split(1)]
    wait = statistics.fmean(waits)
    return [
        config["model"]["name"],
        config["data"]["codec"],
        f"{float(tried.succeeded.float().mean()):.3f}",
        f"{tried.malformed / tried.chunks:.4f}",
        f"{tried.jerk / tried.borders:.3f}",
        f"{wait:.1f}",
        f"{1000 * EXECUTE / wait:.0f}",
    ]


def decode(model: Policy, data: Reaching, row: Tensor) -> Tensor:
    """What one robot waits for."""
    return data.tokens.decode(model.act(row)).actions


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    head = [
        "codec",
        "tokens a chunk",
        "vocabulary",
        "rmse of speeds",
        "rmse of gripper",
        "encode, us",
        "decode, us",
        "replay",
    ]
    if options.runs:
        head = ["model", "codec", "success", "malformed", "border jerk", "ms/chunk", "actions/s"]
        show(head, [run_row(folder) for folder in options.runs])
    else:
        show(head, [[name, *codec_row(settings, options.seed)] for name, settings in CODECS.items()])


if __name__ == "__main__":
    main()
