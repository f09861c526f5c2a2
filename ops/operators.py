"""The table of operators: one entry gives an operator every proof of the shared harness and a line in `zoo doctor`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.affine_scan import affine_scan, affine_scan_summary
from zoo.ops.block_affine_scan import block_affine_scan, block_affine_scan_summary
from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.proof import Inputs, OperatorSpec, Sizes
from zoo.ops.selective_scan import selective_scan, selective_scan_summary


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


def _affine_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    # of either sign, mostly below 1, sometimes above: products neither die at once nor explode
    return {
        "a": torch.tanh(1.5 * _randn(generator, B, T, sizes["D"])) * 1.02,
        "b": _randn(generator, B, T, sizes["D"]),
    }


def _block_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    # rotations and shears of either sign whose products neither die at once nor explode
    return {
        "A": 0.75 * torch.tanh(2 * _randn(generator, B, T, sizes["D"], 2, 2)),
        "b": _randn(generator, B, T, sizes["D"], 2),
    }


def _selective_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    E, N = sizes["E"], sizes["N"]
    return {
        "u": _randn(generator, B, T, E),
        "delta": F.softplus(_randn(generator, B, T, E) - 2),
        "A": -torch.arange(1.0, N + 1, dtype=torch.float64) * torch.exp(0.3 * _randn(generator, E, N)),
        "B": _randn(generator, B, T, N),
        "C": _randn(generator, B, T, N),
        "D": _randn(generator, E),
    }


OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        OperatorSpec(
            name="affine_scan",
            function=affine_scan,
            make=_affine_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["D"]),
            sizes=({"D": 136},),
            time=("a", "b"),
            extremes={
                "a-0": lambda i: i | {"a": i["a"] * 0},
                "a-1": lambda i: i | {"a": i["a"] * 0 + 1},
                "a--1": lambda i: i | {"a": i["a"] * 0 - 1},
                "a-1.5": lambda i: i | {"a": i["a"] * 0 + 1.5, "b": i["b"] * 1e-3},
            },
            cp_kind="affine",
            summary=lambda i, cu: affine_scan_summary(i["a"], i["b"], cu_seqlens=cu),
        ),
        OperatorSpec(
            name="block_affine_scan",
            function=block_affine_scan,
            make=_block_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["D"], 2),
            sizes=({"D": 5},),
            time=("A", "b"),
            extremes={
                "A-0": lambda i: i | {"A": i["A"] * 0},
                "A-identity": lambda i: i | {"A": i["A"] * 0 + torch.eye(2)},
                "A-rotation": lambda i: i | {"A": i["A"] * 0 + torch.tensor([[0.0, -1.0], [1.0, 0.0]])},
            },
            cp_kind="affine",
            summary=lambda i, cu: block_affine_scan_summary(i["A"], i["b"], cu_seqlens=cu),
        ),
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
        OperatorSpec(
            name="selective_scan",
            function=selective_scan,
            make=_selective_inputs,
            state=lambda n, sizes, generator: _randn(generator, n, sizes["E"], sizes["N"]),
            sizes=({"E": 6, "N": 3},),
            time=("u", "delta", "B", "C"),
            extremes={
                "delta-0": lambda i: i | {"delta": i["delta"] * 0},
                "delta huge": lambda i: i | {"delta": i["delta"] * 0 + 1000.0, "u": i["u"] * 1e-3},
                "delta 0, tiny or huge": lambda i: (
                    i | {"delta": 300.0 * (i["delta"] > 0.3).to(i["delta"]) + 1e-6 * (i["delta"] < 0.1)}
                ),
            },
            cp_kind="affine",
            summary=lambda i, cu: selective_scan_summary(i["u"], i["delta"], i["A"], i["B"], cu_seqlens=cu),
        ),
    )
}
