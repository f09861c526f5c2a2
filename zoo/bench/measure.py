"""Seconds, bytes and the speed of matrix products, measured the same way for every side."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["MEMORY_BY", "Clock", "dtype_of", "matmul_peak", "peak_bytes", "synchronize"]

SAMPLE = 0.01  # seconds: shorter calls are repeated within one sample, so that the clock's grain does not show
MEMORY_BY = {
    "cuda": "torch.cuda.max_memory_allocated above what was allocated before the call",
    "cpu": "peak of live torch memory above what was live before the call, by torch.profiler's allocations",
}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Times calls on one device; on CUDA by events, with the second-level cache emptied before each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cache: Tensor | None = None
        if device.type == "cuda":
            self._cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # more than any cache of today

    def calls_per_sample(self, call: Callable[[], Any]) -> int:
        """How many calls make a sample that the clock can read; the call must be warm."""
        return 1 if self._cache is not None else max(1, round(SAMPLE / max(self.seconds(call), 1e-7)))

    def seconds(self, call: Callable[[], Any], n: int = 1) -> float:
        """Seconds per call, over n calls."""
        if self._cache is None:
            start = time.perf_counter()
            for _ in range(n):
                call()
            return (time.perf_counter() - start) / n
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        start_event.record()
        for _ in range(n):
            call()
        end_event.record()
        torch.cuda.synchronize(self.device)
        milliseconds: float = start_event.elapsed_time(end_event)
        return milliseconds / 1e3 / n

    def first(self, call: Callable[[], Any]) -> float:
        """Seconds of a first call as a user waits for it: compilation and tuning included."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that was live during a call, above what was live before; see MEMORY_BY."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    return highest(seen)


def highest(seen: profile) -> int:
    """The highest sum of the allocations and frees on the CPU that a profile saw."""
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of this machine's best square matrix product of `repeats`, in this dtype."""
    n = 1024 if device.type == "cpu" else 8192 if dtype.itemsize == 2 else 4096
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    clock = Clock(device)
    a @ b
    return 2 * n**3 / min(clock.seconds(lambda: a @ b) for _ in range(repeats))
