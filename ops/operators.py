"""The table of operators: one entry gives an operator every proof of the shared harness and a line in `zoo doctor`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.attention import attention
from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.proof import Inputs, OperatorSpec, Sizes


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


def _attention_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    Hk = sizes.get("Hk", H)
    return {
        "q": _randn(generator, B, T, H, K),
        "k": _randn(generator, B, T, Hk, K),
        "v": _randn(generator, B, T, Hk, V),
    }


def _attention(name: str, masks: dict[str, bool | int], *sizes: Sizes) -> OperatorSpec:
    """With the log-sum-exp, so that its gradient is proved too: the torch form is our own; SDPA has its own tests."""
    return OperatorSpec(
        name=name,
        function=partial(attention, return_lse=True, **masks),
        make=_attention_inputs,
        state=None,
        sizes=sizes,
        time=("q", "k", "v"),
        extremes=_ATTENTION_EXTREMES,
        cp_kind="attention",
    )


_ATTENTION_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    # of signs: whole numbers, so that the scores are exact and keys tie; a rounded score of 1e4 would be off by 1e-3
    "scores of thousands": lambda i: i | {"q": 4096 * i["q"].sign(), "k": i["k"].sign()},
    "no scores": lambda i: i | {"q": i["q"] * 0},
    "every other key the same": lambda i: (
        i | {"k": torch.where((torch.arange(i["k"].shape[1]) % 2 == 0)[:, None, None], i["k"][:, :1], i["k"])}
    ),
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
        _attention(
            "attention",
            {},
            {"H": 4, "Hk": 2, "K": 16, "V": 32},
            {"H": 2, "Hk": 2, "K": 64, "V": 64},
            {"H": 1, "Hk": 1, "K": 256, "V": 256},
        ),
        _attention(
            "attention_window",
            {"window": 20},
            {"H": 4, "Hk": 2, "K": 16, "V": 16},
            {"H": 1, "Hk": 1, "K": 100, "V": 8},
        ),
        _attention("attention_both_ways", {"causal": False}, {"H": 2, "Hk": 1, "K": 16, "V": 16}),
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
    )
}
