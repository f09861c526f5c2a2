"""The delay task: repeat white noise that was heard 100 steps ago, y_t = u_{t-100}; the error where there is a past.

Linear(1, width) -> one layer -> Linear(width, 1), nothing else: what carries the signal is the layer's own memory. In
white noise there is nothing to guess, so that a model that forgets has an error of 1.

    python benchmarks/delay.py [--layers s4d-lin,s4d-real,rnn] [--steps 200] [--width 32] [--seed 0]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zoo.layers import S4
from zoo.train.optim import AdamW

LENGTH, DELAY, STATE = 256, 100, 64


class Plain(nn.Module):
    """The state space alone: S4 without its activation and gate."""

    def __init__(self, width: int, **options: str):
        super().__init__()
        self.layer = S4(width, d_state=STATE, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.system(x)[0]


class Recurrent(nn.Module):
    """torch's tanh RNN."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.RNN(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


LAYERS: Mapping[str, Callable[[int], nn.Module]] = {
    "s4d-lin": lambda width: Plain(width),
    "s4d-inv": lambda width: Plain(width, init="inv"),
    "s4d-legs": lambda width: Plain(width, init="legs"),
    "s4d-real": lambda width: Plain(width, init="real"),
    "s4": lambda width: Plain(width, mode="dplr"),
    "rnn": Recurrent,
}


def train(name: str, *, steps: int, width: int = 32, batch: int = 16, seed: int = 0) -> list[float]:
    """The mean squared error after 1, 2, ... steps, each on fresh noise; AdamW at 0.01, the systems at 0.001."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, width), LAYERS[name](width), nn.Linear(width, 1))
    optimizer = AdamW(lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999)).build(model)
    errors = []
    for _ in range(steps):
        u = torch.randn(batch, LENGTH, 1)
        loss = (model(u)[:, DELAY:] - u[:, :-DELAY]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="s4d-lin,s4d-legs,s4,s4d-real,rnn", help=f"of {', '.join(LAYERS)}")
    for name, default in (("steps", 200), ("width", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    names = args.layers.split(",")
    if unknown := [name for name in names if name not in LAYERS]:
        sys.exit(f"no layer {', '.join(unknown)}; there are {', '.join(LAYERS)}")
    marks = [n for n in (50, 100, 200, 300, 1000) if n < args.steps] + [args.steps]
    print(f"width {args.width}, state {STATE}, delay {DELAY} of {LENGTH}; torch {torch.__version__}; seed {args.seed}")
    print(f"{'error after':10}", *(f"{mark:>8}" for mark in marks), "steps (mean of the last 5)")
    for name in names:
        start = time.process_time()
        errors = train(name, steps=args.steps, width=args.width, seed=args.seed)
        means = (statistics.mean(errors[max(0, mark - 5) : mark]) for mark in marks)
        print(f"{name:11}", *(f"{mean:8.4f}" for mean in means), f"{time.process_time() - start:6.0f} s of CPU time")


if __name__ == "__main__":
    main()
