"""What fraction of a block's token-wise values is sent to the host, when the rest is computed again."""

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["measure", "offload_fraction"]


def offload_fraction(
    *,
    bandwidth: float,
    seconds: float,
    inputs: float,
    mixer: float,
    others: float,
    host: float,
    n_layers: int,
) -> float | None:
    """The largest alpha in [0, 1] whose copies hide behind the computation and fit on the host.

        (inputs + mixer + alpha others) / bandwidth <= seconds
        (n_layers - 2) (inputs + mixer + alpha others) <= host

    One variable, so the smaller of the two bounds is the answer.

    Args:
        bandwidth: bytes a second to the host.
        seconds: of a block's forward pass.
        inputs, mixer: bytes of a block's inputs and of its operator's outputs, which are always sent.
        others: bytes of what else the block saves.
        host: bytes that may be used there.
        n_layers: blocks; the last two are not sent.

    Returns:
        alpha; None where even inputs and outputs are too much: then nothing but inputs should be sent, or nothing.

    Source: arXiv 2407.12117, section 4.
    """
    least = inputs + mixer
    room = bandwidth * seconds - least
    if n_layers > 2:
        room = min(room, host / (n_layers - 2) - least)
    if room < 0:
        return None
    return 1.0 if others == 0 else min(1.0, room / others)


def measure(block: Callable[[torch.Tensor], Any], x: torch.Tensor, repeats: int = 3) -> tuple[float, float]:
    """(seconds of a block's forward pass, bytes a second to the host) on x's device: the best of `repeats`."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            start = time.perf_counter()
            call()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
        return max(min(times[1:]), 1e-9)

    with torch.no_grad():
        seconds = best(lambda: block(x))
        copying = best(lambda: host.copy_(x, non_blocking=True))
    return seconds, x.numel() * x.element_size() / copying
