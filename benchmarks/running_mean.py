"""The running-mean task: of random values some are flagged; say the mean of the flagged ones so far, at every position.

Linear(2, width), one block of a mixer and a feed-forward, Linear(width, 1). The control sees the newest token alone: it
knows nothing of the past, and its error stays near 0.3.

    python benchmarks/running_mean.py [--mixers "aaren(n_heads=2); gla"] [--steps 400] [--width 32] [--seed 0]
"""

import argparse
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers import MLP, Block, layer_mixers

FLAGGED = 0.3  # share of the tokens


class TokenAlone(nn.Module):
    """The control: a mixer that treats every token as a sequence of its own."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: None = None, *, cu_seqlens: None = None) -> tuple[Tensor, None]:
        return self.mixer(x.flatten(0, 1).unsqueeze(1))[0].view(x.shape), None


class Regression(nn.Module):
    """(B, T, 2) -> (B, T)."""

    def __init__(self, mixer: str, width: int, alone: bool = False):
        super().__init__()
        made = layer_mixers(width, 1, mixer, {})(0)
        self.up = nn.Linear(2, width)
        self.block = Block(width, TokenAlone(made) if alone else made, MLP(width), norm=nn.LayerNorm)
        self.down = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.block(self.up(x))[0])
        return y.squeeze(-1)


def batch(generator: torch.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Values and flags (B, T, 2); the mean of the flagged values so far (B, T), 0 before the first."""
    values = torch.randn(rows, length, generator=generator)
    flags = (torch.rand(rows, length, generator=generator) < FLAGGED).float()
    means = (values * flags).cumsum(1) / flags.cumsum(1).clamp_min(1)
    return torch.stack([values, flags], dim=-1), means


def train(
    mixer: str, *, steps: int, width: int = 32, length: int = 24, rows: int = 32, seed: int = 0, alone: bool = False
) -> list[float]:
    """The mean squared error after 1, 2, ... steps, each on fresh sequences; AdamW at 0.005."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = Regression(mixer, width, alone)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(steps):
        x, means = batch(generator, rows, length)
        loss = F.mse_loss(model(x), means)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="aaren(n_heads=2)", help="patterns of one layer, with ; between")
    for name, default in (("steps", 400), ("width", 32), ("length", 24), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    sizes = {"steps": args.steps, "width": args.width, "length": args.length, "seed": args.seed}
    print(f"mean squared error, mean of the last 20 of {args.steps} steps; torch {torch.__version__}")
    for mixer in args.mixers.split(";"):
        for alone in (False, True):
            error = statistics.fmean(train(mixer.strip(), alone=alone, **sizes)[-20:])
            print(f"{mixer.strip()}{', every token alone' if alone else ''}: {error:.4f}")


if __name__ == "__main__":
    main()
