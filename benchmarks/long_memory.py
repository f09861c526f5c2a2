"""100,000 tokens through a memory that learns at test time, inputs in bfloat16: is it finite, how far does it drift?

The inputs are rounded to bfloat16. One run gets them as they are, with states in float32, the other in float64. Drift
is ||y - y64|| / ||y64|| over a tenth of the tokens; bfloat16 outputs alone cost 0.002. Values are a matrix times the
key, plus noise of the deviation `--noise` times theirs. With `--noise inf` there is nothing to learn.

    python benchmarks/long_memory.py [--mixers "yaad; moneta; memora"] [--tokens 100000] [--noise 1] [--seed 0]
"""

import argparse
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.layers import layer_mixers
from zoo.layers.memory_mixer import MemoryMixer
from zoo.ops import MemoryState, test_time_memory

WIDTH, HEADS, PIECE = 64, 4, 4000  # four heads are the mixers' own default


def inputs(
    mixer: MemoryMixer, tokens: int, truth: Tensor, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random unit keys and queries, values, and gates about those of an untrained mixer, each in float64."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    assert mixer.keep is not None
    size = mixer.size
    made = {
        "q": F.normalize(drawn(size), dim=-1),
        "k": F.normalize(drawn(size), dim=-1),
        "eta": mixer.eta_max / size * drawn().sigmoid(),
        "g": F.logsigmoid(drawn() + math.log(mixer.keep / (1 - mixer.keep))),
    }
    made["v"] = drawn(size) if math.isinf(noise) else made["k"] @ truth + noise * drawn(size)
    if mixer.rule.loss.thresholded:
        made["delta"] = F.softplus(drawn() + size**0.5)
    if mixer.rule.algorithm.momentum:
        made["theta"] = F.logsigmoid(drawn() + math.log(mixer.keep_momentum / (1 - mixer.keep_momentum)))
    return made


def drift(name: str, tokens: int, noise: float, seed: int) -> tuple[list[float], float]:
    """For each tenth of the tokens; and the largest number of the state at the end."""
    torch.manual_seed(seed)
    mixer = layer_mixers(WIDTH, 1, name, {})(0)
    assert isinstance(mixer, MemoryMixer)
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(mixer.size, mixer.size, generator=generator, dtype=torch.float64)
    states: list[MemoryState | None] = [None, None]
    off, size = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for begin in range(0, tokens, PIECE):
        given = inputs(mixer, min(PIECE, tokens - begin), truth, noise, generator)
        rounded = {key: x.bfloat16() if key in "qkv" else x.float() for key, x in given.items()}
        ys = []
        for i, args in enumerate((rounded, {key: x.double() for key, x in rounded.items()})):
            start = tuple(x.to(args["eta"].dtype) for x in mixer.start)
            y, states[i] = test_time_memory(**args, start=start, state=states[i], rule=mixer.rule)
            ys.append(y.double())
        at = min(9, begin * 10 // tokens)
        off[at] += (ys[0] - ys[1]).square().sum()
        size[at] += ys[1].square().sum()
    last = states[0]
    assert last is not None
    return (off / size).sqrt().tolist(), max(float(w.abs().max()) for w in last.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="yaad; moneta; memora")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--noise", type=float, default=1.0, help="over the deviation of a value; inf for noise alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.mixers.split(";"):
        with torch.no_grad():
            each, largest = drift(name.strip(), options.tokens, options.noise, options.seed)
        print(
            f"{name.strip():8} drift {' '.join(f'{x:.4f}' for x in each)}   largest number in the state {largest:.3g}"
        )


if __name__ == "__main__":
    main()
