"""Which form of an operator runs: the loop ("reference"), fast torch ("torch") or Triton kernels ("triton")."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from zoo.ops.core.differentiation import drops_tangents, in_forward_mode, with_tangents

try:
    import triton
except ImportError:  # no wheel for this platform (macOS, Windows): the torch forms carry everything
    triton = None

# float32 products on NVIDIA's tensor cores in three passes, close to exact; AMD's have no such form
EXACT_PRODUCTS = "ieee" if torch.version.hip else "tf32x3"
Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "torch", "reference")
HAS_TRITON = triton is not None
# Under TRITON_INTERPRET=1 kernels run in numpy on CPU tensors: slow, and exact enough to prove them without a GPU.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


# Asked once: torch 2.11's compiler cannot trace the question, and some devices ("meta") answer by an error.
AUTOCAST = tuple(device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device))

P = ParamSpec("P")
R = TypeVar("R")


def keeps_its_precision(operator: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside a public operator: it accumulates in the dtypes that it documents.

    In forward mode the operator refuses what its form would drop.
    """

    @functools.wraps(operator)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if in_forward_mode():
            return with_tangents(kept, *args, **kwargs)
        return kept(*args, **kwargs)

    @functools.wraps(operator)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        given: tuple[Any, ...] = (*args, *kwargs.values())
        device = next((x.device.type for x in given if isinstance(x, Tensor)), "cpu")
        if device not in AUTOCAST or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return run


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Launch kernels on the device of the first tensor: Triton takes the current one, which may be another."""

    @functools.wraps(launch)
    @drops_tangents
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given: tuple[Any, ...] = (*args, *kwargs.values())
        device = next(x.device for x in given if isinstance(x, Tensor))
        if device.type != "cuda":
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return run


@functools.cache
def say_once(message: str) -> None:
    """Warn, the first time only."""
    warnings.warn(message, stacklevel=4)


def on_cuda(x: Tensor) -> bool:
    """Whether "auto" may run kernels on this tensor."""
    return x.is_cuda


def resolve(operator: str, backend: str, x: Tensor) -> str:
    """The backend that will run for tensors like `x`: "triton", "torch" or "reference".

    "auto" is Triton on CUDA devices and torch elsewhere. An explicit request is kept or refused, never replaced; when
    "auto" cannot take the fast road on a CUDA device it says so once.

    Raises:
        ValueError: an unknown backend, or "triton" where no kernel can run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        if not on_cuda(x):
            return "torch"
        if HAS_TRITON:
            return "triton"
        say_once(
            "Triton is not installed, so zoo's operators run their torch forms on this CUDA device; pip install triton"
        )
        return "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(
                f"{operator}: backend 'triton' needs the triton package; install it or use backend='torch'"
            )
        if not (x.is_cuda or x.is_meta or INTERPRETED):  # on meta tensors a kernel's fake runs: shapes and FLOPs only
            raise ValueError(
                f"{operator}: backend 'triton' needs CUDA tensors, got {x.device}; "
                "move them, use backend='torch', or set TRITON_INTERPRET=1 before the start to test kernels on a CPU"
            )
        if INTERPRETED and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            raise ValueError(
                f"{operator}: Triton's interpreter computes in numpy, which has no bfloat16, and would return garbage; "
                "got bfloat16 tensors under TRITON_INTERPRET=1, use float16 or float32"
            )
    return backend


def state_dtype(x: Tensor) -> torch.dtype:
    """States are float32, and float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
