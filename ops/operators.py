"""The table of operators: one entry gives an operator every proof of the shared harness and a line in `zoo doctor`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.proof import Inputs, OperatorSpec, Sizes
from zoo.ops.rms_norm import ORDERS, gated_rms_norm, rms_norm
from zoo.ops.rotary import LAYOUTS, rotary
from zoo.ops.swiglu import swiglu


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _conv_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    D, W = sizes["D"], sizes["W"]
    return {
        "x": _randn(generator, B, T, D),
        "weight": _randn(generator, D, W) * W**-0.5,
        "bias": _randn(generator, D),
    }


def _gla_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    return {
        "q": _randn(generator, B, T, H, K),
        "k": _randn(generator, B, T, H, K),
        "v": _randn(generator, B, T, H, V),
        "g": _log_decay(_randn(generator, B, T, H, K)),
    }


def _log_decay(x: Tensor) -> Tensor:
    """From hardly any decay to a strong one: the median step keeps half."""
    return -F.softplus(2 * x)


def _some(i: Inputs, strong: float, share: float) -> Inputs:
    """The gate of a random share of steps and channels becomes `strong`."""
    chosen = torch.rand(i["g"].shape, generator=torch.Generator().manual_seed(3)) < share
    return i | {"g": torch.where(chosen, torch.full_like(i["g"], strong), i["g"])}


def _delta_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    return {
        "q": F.normalize(_randn(generator, B, T, H, K), dim=-1) * K**0.5,
        "k": F.normalize(_randn(generator, B, T, H, K), dim=-1),
        "v": _randn(generator, B, T, H, V),
        "beta": 2 * torch.rand(B, T, H, generator=generator, dtype=torch.float64),
    }


def _gated_delta_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    made = _delta_inputs(B, T, sizes, generator)
    return made | {"g": F.logsigmoid(_randn(generator, B, T, sizes["H"]) + 2)}


def _loss_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Every fourth target is not scored, the first one is."""
    D, V = sizes["D"], sizes["V"]
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.arange(B * T).view(B, T) % 4 == 3] = -100
    return {
        "x": _randn(generator, B, T, D),
        "weight": _randn(generator, V, D) * D**-0.5,
        "bias": _randn(generator, V),
        "targets": targets,
    }


_LOSS_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "logits of hundreds": lambda i: i | {"weight": i["weight"] * 100},
    "a token that cannot be": lambda i: i | {"bias": i["bias"].index_fill(0, torch.tensor([1]), -1e4)},
    "all targets the same": lambda i: i | {"targets": i["targets"] * 0},
    "one scored": lambda i: i | {"targets": torch.where(torch.arange(i["targets"].numel()) == 5, i["targets"], -100)},
}


def _norm_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    shape = (B, T, sizes["H"], sizes["D"]) if "H" in sizes else (B, T, sizes["D"])
    return {"x": _randn(generator, *shape), "weight": _randn(generator, sizes["D"])}


def _gated_norm_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    made = _norm_inputs(B, T, sizes, generator)
    return made | {"gate": 2 * _randn(generator, *made["x"].shape)}


def _swiglu_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {name: 2 * _randn(generator, B, T, sizes["F"]) for name in ("gate", "up")}


def _rotary_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Positions of their own for every row; with `shared` one table for all."""
    angles = 100 * _randn(generator, 1 if "shared" in sizes else B, T, sizes["K"] // 2)
    return {"x": _randn(generator, B, T, sizes["H"], sizes["K"]), "cos": angles.cos(), "sin": angles.sin()}


_NORM_SIZES = ({"D": 8}, {"H": 2, "D": 100}, {"D": 300})
_NORM_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "zeros": lambda i: i | {"x": i["x"] * 0},
    "small": lambda i: i | {"x": i["x"] * 1e-4},
    "large": lambda i: i | {"x": i["x"] * 1e4},
}
_GATE_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "open": lambda i: i | {"gate": i["gate"] * 0 + 30},
    "closed": lambda i: i | {"gate": i["gate"] * 0 - 30},
    "far": lambda i: i | {"gate": i["gate"] * 100},
}
_DELTA_SIZES = (
    {"H": 1, "K": 64, "V": 64},
    {"H": 2, "K": 8, "V": 16},
    {"H": 1, "K": 100, "V": 128},
    {"H": 1, "K": 128, "V": 100},
)
_DELTA_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "beta-0": lambda i: i | {"beta": i["beta"] * 0},
    "beta-1": lambda i: i | {"beta": i["beta"] * 0 + 1},
    "beta-2": lambda i: i | {"beta": i["beta"] * 0 + 2},
    "one-key": lambda i: i | {"k": i["k"][:, :1].expand_as(i["k"]).contiguous()},
    # of length exactly 1: the sign of the state would otherwise drift by T rounding errors of k^T k, in any form
    "one-key-beta-2": lambda i: (
        i | {"k": (i["k"] * 0 + i["k"][:, :1]).sign() * i["k"].shape[-1] ** -0.5, "beta": i["beta"] * 0 + 2}
    ),
}
_GATED_DELTA_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "g-0": lambda i: i | {"g": i["g"] * 0},
    "g-8": lambda i: i | {"g": i["g"] * 0 - 8},
    "g-8-beta-2": lambda i: i | {"g": i["g"] * 0 - 8, "beta": i["beta"] * 0 + 2},
    "one-key-beta-1": lambda i: i | {"k": i["k"][:, :1].expand_as(i["k"]).contiguous(), "beta": i["beta"] * 0 + 1},
}


OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        OperatorSpec(
            name="causal_conv1d",
            function=causal_conv1d,
            make=_conv_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["W"] - 1, sizes["D"]),
            sizes=({"D": 8, "W": 4}, {"D": 70, "W": 2}, {"D": 5, "W": 1}),
            time=("x",),
            extremes={"zero": lambda i: i | {"x": i["x"] * 0}},
            cp_kind="halo",
            summary=lambda i, cu: causal_conv1d_summary(i["x"], i["weight"].shape[1], cu_seqlens=cu),
        ),
        OperatorSpec(
            name="gated_linear_attention",
            function=gated_linear_attention,
            make=_gla_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
            sizes=(
                {"H": 2, "K": 8, "V": 16},
                {"H": 1, "K": 64, "V": 64},
                {"H": 1, "K": 100, "V": 128},
                {"H": 1, "K": 128, "V": 100},
            ),
            time=("q", "k", "v", "g"),
            extremes={
                "forget everything": lambda i: i | {"g": torch.full_like(i["g"], -8.0)},
                "forget nothing": lambda i: i | {"g": i["g"] * 0},
                "resets": lambda i: _some(i, -50.0, 0.1),
                "all gates at once": lambda i: _some(_some(_some(i, -8.0, 0.3), 0.0, 0.3), -50.0, 0.05),
            },
            cp_kind="affine",
            summary=lambda i, cu: gated_linear_attention_summary(i["k"], i["v"], i["g"], cu_seqlens=cu),
        ),
        OperatorSpec(
            name="delta_rule",
            function=delta_rule,
            make=_delta_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
            sizes=_DELTA_SIZES,
            time=("q", "k", "v", "beta"),
            extremes=_DELTA_EXTREMES,
            cp_kind="affine",
            summary=lambda i, cu: delta_rule_summary(i["k"], i["v"], i["beta"], cu_seqlens=cu),
        ),
        OperatorSpec(
            name="gated_delta_rule",
            function=delta_rule,
            make=_gated_delta_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
            sizes=_DELTA_SIZES,
            time=("q", "k", "v", "beta", "g"),
            extremes=_GATED_DELTA_EXTREMES,
            cp_kind="affine",
            summary=lambda i, cu: delta_rule_summary(i["k"], i["v"], i["beta"], i["g"], cu_seqlens=cu),
        ),
        *(
            OperatorSpec(
                name=f"linear_cross_entropy_{reduction}",
                function=functools.partial(linear_cross_entropy, reduction=reduction),
                make=_loss_inputs,
                state=None,
                sizes=({"D": 8, "V": 17}, {"D": 70, "V": 300}),
                time=("x", "targets"),
                extremes=_LOSS_EXTREMES,
                cp_kind="local",
                packed=False,
                wide_output=True,
            )
            for reduction in ("mean", "none")
        ),
        OperatorSpec(
            name="rms_norm",
            function=rms_norm,
            make=_norm_inputs,
            state=None,
            sizes=_NORM_SIZES,
            time=("x",),
            extremes=_NORM_EXTREMES,
            cp_kind="local",
            packed=False,
        ),
        *(
            OperatorSpec(
                name=f"gated_rms_norm_{order}",
                function=functools.partial(gated_rms_norm, order=order),
                make=_gated_norm_inputs,
                state=None,
                sizes=_NORM_SIZES,
                time=("x", "gate"),
                extremes=_NORM_EXTREMES | _GATE_EXTREMES,
                cp_kind="local",
                packed=False,
            )
            for order in ORDERS
        ),
        OperatorSpec(
            name="swiglu",
            function=swiglu,
            make=_swiglu_inputs,
            state=None,
            sizes=({"F": 8}, {"F": 300}),
            time=("gate", "up"),
            extremes=_GATE_EXTREMES,
            cp_kind="local",
            packed=False,
        ),
        *(
            OperatorSpec(
                name=f"rotary_{layout}",
                function=functools.partial(rotary, layout=layout),
                make=_rotary_inputs,
                state=None,
                sizes=({"H": 2, "K": 8}, {"H": 3, "K": 100}, {"H": 2, "K": 64, "shared": 1}),
                time=("x", "cos", "sin"),
                extremes={"no angle": lambda i: i | {"cos": i["cos"] * 0 + 1, "sin": i["sin"] * 0}},
                cp_kind="local",
                packed=False,
            )
            for layout in LAYOUTS
        ),
    )
}
