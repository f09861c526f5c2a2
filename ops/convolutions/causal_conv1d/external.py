"""The CUDA kernels of the optional package causal-conv1d, behind our layout, where they can run.

They want (B, D, T) with the channels next to each other in memory, which is a view of our (B, T, D). What they do not
have stays with our kernels: other widths, float64, D or strides that are not multiples of 8, packed documents with
initial states, fewer tokens than taps, and a fixed order of summation in the backward pass.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core import dispatch

PACKAGE, MODULE = "causal-conv1d", "causal_conv1d"
WIDTHS = (2, 3, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR = 8  # elements that its kernels load at once


class Installed(NamedTuple):
    """The package's function or None; why not, if the package is installed and does not work."""

    function: Callable[..., Any] | None
    problem: str


@functools.cache
def installed() -> Installed:
    """Import the package, at the first call. A build that does not fit torch fails here, in many ways."""
    try:
        return Installed(importlib.import_module(MODULE).causal_conv1d_fn, "")
    except Exception as error:  # a missing extension, undefined symbols, another CUDA: the operator has other forms
        if isinstance(error, ModuleNotFoundError) and error.name == MODULE:
            return Installed(None, "")
        lines = str(error).splitlines() or [""]
        return Installed(None, f"{type(error).__name__}: {lines[0]}")


def available() -> bool:
    """Whether "auto" can hand CUDA tensors to the package."""
    return installed().function is not None


def status() -> str:
    """One line for `zoo doctor`."""
    function, problem = installed()
    if problem:
        return f"{PACKAGE} is installed and cannot be used ({problem}); zoo's own kernels run"
    if function is None:
        return f"{PACKAGE} is not installed (optional); zoo's own kernels run"
    return f"{PACKAGE} runs causal_conv1d on CUDA by default, for {WIDTHS[0]} to {WIDTHS[-1]} taps"


def _on_its_device(x: Tensor) -> bool:
    return x.is_cuda


def serves(x: Tensor, width: int, *, packed: bool, with_state: bool) -> bool:
    """Whether the package is there and takes this call; says once when it is installed and broken."""
    if not _on_its_device(x) or torch.compiler.is_compiling():
        return False
    if width not in WIDTHS or x.dtype not in DTYPES or x.shape[1] < width or x.shape[2] % VECTOR or not x.numel():
        return False
    if (packed and with_state) or torch.are_deterministic_algorithms_enabled():
        return False
    function, problem = installed()
    if problem:
        dispatch.say_once(
            f"{PACKAGE} is installed and cannot be used ({problem}), so zoo's own kernels run; "
            f"pip uninstall {PACKAGE}, or install a build for torch {torch.__version__}"
        )
    return function is not None


def causal_conv1d_external(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None,
    cuts: tuple[int, ...] | None,
) -> Tensor:  # fmt: skip
    """x (B, T, D), state (B, W - 1, D) or None for zeros -> y (B, T, D); for calls that `serves` accepts."""
    function = installed().function
    assert function is not None
    if x.stride(2) != 1 or any(n % VECTOR for n in (x.stride(0), x.stride(1), x.storage_offset())):
        x = x.clone(memory_format=torch.contiguous_format)
    documents = None
    if cuts is not None:
        of_token = torch.bucketize(torch.arange(x.shape[1]), torch.tensor(cuts[1:]), right=True)
        documents = of_token.to(x.device, torch.int32).unsqueeze(0)
    y: Tensor = function(
        x.mT, weight.contiguous(), None if bias is None else bias.contiguous(), seq_idx=documents,
        initial_states=None if state is None else state.contiguous().mT, activation=activation,
    ).mT  # fmt: skip
    if y.requires_grad:
        y.register_hook(torch.Tensor.contiguous)  # its backward refuses gradients with odd strides
    return y
