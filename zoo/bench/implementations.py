"""Who competes: zoo's own forms, the loop, and other libraries' functions behind our signature."""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.bench.flops import attention_flops, forms
from zoo.bench.gate import LOOP_BYTES, loop_bytes
from zoo.bench.shapes import Case, Sizes
from zoo.errors import UsageError
from zoo.ops import attention
from zoo.ops.core import dispatch
from zoo.ops.core.spec import Inputs, OperatorSpec
from zoo.registry import resolve

__all__ = ["Side", "choose_sides"]


@dataclass(frozen=True)
class Side:
    """One competitor: a name, the operator that it claims to be, and the backend to ask for.

    `spec.function` is what runs, on the inputs of `spec.make`.
    """

    name: str
    spec: OperatorSpec
    backend: str


DEAR = 5e11  # FLOPs: attention of more takes a CPU half a minute a round, and its proof longer
# flash-linear-attention's functions for ours: (where, the names of our inputs in its order).
FLA: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gated_linear_attention": ("fla.ops.gla:chunk_gla", ("q", "k", "v", "g")),
    "delta_rule": ("fla.ops.delta_rule:chunk_delta_rule", ("q", "k", "v", "beta")),
    "gated_delta_rule": ("fla.ops.gated_delta_rule:chunk_gated_delta_rule", ("q", "k", "v", "g", "beta")),
}


def choose_sides(
    spec: OperatorSpec, case: Case, device: torch.device, wanted: tuple[str, ...]
) -> tuple[list[Side], list[str]]:
    """The sides of a case, zoo's default form first, and notes on those that were left out.

    Raises:
        UsageError: a side was asked for by name that cannot compete here.
    """
    default = "triton" if device.type == "cuda" and "triton" in forms(spec) and dispatch.HAS_TRITON else "torch"
    order = [default, *(name for name in ("triton", "torch", "reference", "fla", "sdpa") if name != default)]
    sides: list[Side] = []
    notes: list[str] = []
    for name in (name for name in order if not wanted or name in wanted):
        why = _why_not(name, spec, case, device)
        if why is None and name == "reference" and not wanted and loop_bytes(spec, case.sizes) > LOOP_BYTES:
            notes.append("the loop is left out at this length; backends=reference,... insists on it")
        elif (
            name == "sdpa"
            and why is None
            and not wanted
            and device.type == "cpu"
            and attention_flops(case.sizes)[1] > DEAR
        ):
            notes.append("SDPA is left out at this length on a CPU; backends=torch,sdpa insists on it")
        elif why is None:
            sides.append(_side(name, spec))
        elif wanted:
            raise UsageError(f"backends={name} cannot run {case.operator} here: {why}")
        elif name == "fla":
            notes.append(f"flash-linear-attention is not compared: {why}")
    return sides, notes


def _why_not(name: str, spec: OperatorSpec, case: Case, device: torch.device) -> str | None:
    """Why a side cannot compete, or nothing."""
    if name == "reference":
        return None
    if name == "fla":
        if spec.name not in FLA:
            return "it has no such function, as far as zoo knows"
        if importlib.util.find_spec("fla") is None:
            return "it is not installed; pip install flash-linear-attention"
        return None if device.type == "cuda" else "its kernels need a CUDA device"
    if name == "sdpa":
        return None if _has_queries(spec) else "it takes q, k and v"
    if name not in forms(spec):
        return f"the operator's forms are {', '.join(forms(spec))}"
    if name == "triton" and device.type != "cuda":
        return "kernels need a CUDA device"  # the interpreter's speed means nothing
    if name == "triton" and case.dtype == "float64":
        return "kernels take float32 or narrower"
    return None


def _has_queries(spec: OperatorSpec) -> bool:
    """Whether the operator takes q, k and v (B, T, H, ...), as softmax attention does."""
    if not {"H", "K", "V"} <= spec.sizes[0].keys():
        return False
    inputs = spec.make(1, 1, spec.sizes[0], torch.Generator())
    return all(name in inputs and inputs[name].ndim == 4 for name in ("q", "k", "v"))


def _side(name: str, spec: OperatorSpec) -> Side:
    if name == "fla":
        where, names = FLA[spec.name]
        return Side("fla", dataclasses.replace(spec, function=_Fla(where, names, spec)), "auto")
    if name == "sdpa":
        return Side("sdpa", _attention_beside(spec), "sdpa")
    return Side(name, spec, name)


class _Fla:
    """A function of flash-linear-attention, called like ours."""

    def __init__(self, where: str, names: tuple[str, ...], spec: OperatorSpec) -> None:
        functools.update_wrapper(self, spec.function)
        self.names = names
        self.function = resolve(where)

    def __call__(self, *, backend: str, cu_seqlens: None = None, **inputs: Tensor) -> tuple[Tensor, ...]:
        assert backend == "auto"  # the exact numbers come from the operator's own spec
        out: tuple[Tensor, ...] = self.function(*(inputs[name] for name in self.names), output_final_state=True)
        return out


@functools.wraps(attention)
def _sdpa(*, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Causal softmax attention by torch, in our layout; zoo's own for the exact numbers."""
    if backend != "sdpa":
        return attention(q, k, v, backend=backend)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _attention_beside(spec: OperatorSpec) -> OperatorSpec:
    """Softmax attention on the queries, keys and values of another operator."""

    def make(batch: int, length: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
        inputs = spec.make(batch, length, sizes, generator)
        return {name: inputs[name] for name in ("q", "k", "v")}

    return OperatorSpec(
        name="attention",
        function=_sdpa,
        make=make,
        state=None,
        sizes=spec.sizes,
        time=("q", "k", "v"),
        extremes={},
        packed=False,
    )
