"""What moves along time in TCNCA and MEGA, over the length: dilated convolutions, averages, and a Fourier transform.

    OMP_NUM_THREADS=1 python benchmarks/dilated_convolution.py [--lengths 4096,16384,65536] [--width 64] [--repeats 3]

Times of one forward, and of one forward and backward, in ms: the least of the repeats. On a CPU that is time of the
processor, so that a busy machine matters less; on CUDA (--device cuda) it is the clock's. Freed memory is kept, as in
training. The last lines are time(8 T) over time(T) of whole layers of width 256.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.layers import TCNCA, Mega
from zoo.layers.moving_average import MovingAverage
from zoo.layers.temporal_convolution import TemporalConvolution
from zoo.ops import causal_conv1d, fft_convolution
from zoo.train.memory.malloc import keep_freed_arrays

WIDTH, DILATION = 17, 16  # taps of a convolution, and how far apart
GROWS = 256  # width of the whole layers


class FourierAverage(MovingAverage):
    """MEGA's moving average as the official code has it: a kernel as long as the sequence, by Fourier transform."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        a, b, c = self.coefficients()
        steps = torch.arange(x.shape[1], device=x.device)
        kernel = torch.einsum("dn,dnl->dl", b * c, torch.exp(steps * a.log().unsqueeze(-1)))
        return nn.functional.silu(fft_convolution(x, kernel, self.omega)), x.new_zeros(0)


class Convolution(nn.Module):
    """One depthwise convolution with SiLU."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, self.weight, activation="silu", dilation=DILATION)


def seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    """The least of the repeats, after one to warm up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:])


def measured(layer: nn.Module, length: int, width: int, repeats: int, device: str) -> tuple[float, float]:
    """Seconds of a forward, and of a forward and backward."""
    torch.manual_seed(0)
    layer = layer.to(device)
    x = torch.randn(1, length, width, device=device, requires_grad=True)

    def both() -> None:
        layer(x)[0].sum().backward()

    return seconds(lambda: layer(x), repeats, device), seconds(both, repeats, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_arrays()
    D = given.width
    layers = {
        f"convolution, {WIDTH} taps {DILATION} apart": Convolution(D),
        "network of 4 levels, 17 taps, dilations 1 to 64": TemporalConvolution(D),
        "16 averages a channel, in chunks": MovingAverage(D),
        "16 averages a channel, by Fourier transform": FourierAverage(D),
    }
    for length in map(int, given.lengths.split(",")):
        for name, layer in layers.items():
            forward, both = measured(layer, length, D, given.repeats, given.device)
            print(f"T = {length}, D = {D}, {name}: {1e3 * forward:.1f} / {1e3 * both:.1f}", flush=True)
    for kind in (TCNCA, Mega):
        times = [measured(kind(GROWS, d_key=64), n, GROWS, given.repeats, given.device) for n in (2048, 16384)]
        growth = [after / before for before, after in zip(*times, strict=True)]
        print(f"{kind.__name__}, time(16384) / time(2048): {growth[0]:.2f} / {growth[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
