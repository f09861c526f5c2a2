"""Floating-point operations, a multiply-add counted as two."""

import contextlib
import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.bench.model_inputs import example, units
from zoo.ops.core import dispatch
from zoo.ops.core.spec import Inputs, OperatorSpec

__all__ = ["attention_flops", "forms", "forward_flops", "operator_flops", "training_flops"]

LENGTH = 1024  # tokens of context at which work and state are counted


def forward_flops(model: nn.Module, length: int = LENGTH) -> tuple[float, dict[str, int]]:
    """Operations of one forward pass per token (image, ...), of a model on the meta device; and by operator."""
    return _forward_flops(model, length, "meta")


def _forward_flops(model: nn.Module, length: int, device: torch.device | str) -> tuple[float, dict[str, int]]:
    batch = example(model, 1, length, device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return counter.get_total_flops() / units(model, batch), by_operator


def forms(spec: OperatorSpec) -> tuple[str, ...]:
    """The backends of an operator; of every one before specs knew their forms, at an older commit."""
    forms: tuple[str, ...] = getattr(spec, "forms", ("torch", "triton"))
    return forms


def training_flops(model: nn.Module, length: int) -> float:
    """Operations of a training step per token (image, ...): three forward passes, a backward one counted as two."""
    try:
        return 3 * forward_flops(copy.deepcopy(model).to("meta"), length)[0]
    except RuntimeError:  # a model that looks into the data has to be run
        return 3 * _forward_flops(model, length, next(model.parameters()).device)[0]


def operator_flops(spec: OperatorSpec, inputs: Inputs) -> tuple[int, int, str]:
    """(forward, forward and backward, how they were counted) of an operator, by its own formula where it has one.

    The formulas belong to the custom ops, so the operator runs as kernels would, on the meta device: nothing is
    computed. Without Triton the matrix products of the torch form are counted instead.
    """
    form = "triton" if "triton" in forms(spec) and dispatch.HAS_TRITON else "torch"
    if form == "triton":
        with contextlib.suppress(ValueError):  # of kernels that refuse these sizes
            return *_count(spec, inputs, form), "the operator's formula"
    try:
        counts = _count(spec, inputs, "torch")
    except RuntimeError:  # a form that looks into the data has to be computed
        counts = _count(spec, inputs, "torch", next(iter(inputs.values())).device)
    return *counts, "the torch form's products"


def attention_flops(sizes: Mapping[str, int]) -> tuple[int, int]:
    """(forward, forward and backward) of causal attention: half of all pairs; the backward is 2.5 forwards."""
    forward = sizes["B"] * sizes["H"] * sizes["T"] ** 2 * (sizes["K"] + sizes["V"])
    return forward, forward * 7 // 2


def _count(
    spec: OperatorSpec, inputs: Inputs, form: str, device: torch.device = torch.device("meta")
) -> tuple[int, int]:
    narrow = {x.dtype for x in inputs.values() if x.is_floating_point()} - {torch.float64}
    dtype = next(iter(narrow), torch.float32)  # kernels refuse float64; the count does not depend on the dtype
    leaves = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype).requires_grad_(x.is_floating_point())
        for name, x in ((name, x.detach()) for name, x in inputs.items())
    }
    with FlopCounterMode(display=False) as counter:
        output = spec.run(leaves, backend=form)[0]
        forward = counter.get_total_flops()
        floating = [x for x in leaves.values() if x.requires_grad]
        torch.autograd.grad(output, floating, torch.empty_like(output), allow_unused=True)
        return forward, counter.get_total_flops()
