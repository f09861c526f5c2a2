"""What attention must prove."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps

import torch
from torch import Tensor

from zoo.ops.attention.attention import Visible, attention
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn


def _attention_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    Hk = sizes.get("Hk", H)
    return {
        "q": randn(generator, B, T, H, K),
        "k": randn(generator, B, T, Hk, K),
        "v": randn(generator, B, T, Hk, V),
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
    )


_ATTENTION_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    # of signs: whole numbers, so that the scores are exact and keys tie; a rounded score of 1e4 would be off by 1e-3
    "scores of thousands": lambda i: i | {"q": 4096 * i["q"].sign(), "k": i["k"].sign()},
    "no scores": lambda i: i | {"q": i["q"] * 0},
    "every other key the same": lambda i: (
        i | {"k": torch.where((torch.arange(i["k"].shape[1]) % 2 == 0)[:, None, None], i["k"][:, :1], i["k"])}
    ),
}


@wraps(attention)
def _with_sinks(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Under two intervals for each key: the last 20 keys, and the first four, which all later queries see."""
    T, device = k.shape[1] if isinstance(k, Tensor) else 0, k.device if isinstance(k, Tensor) else None
    near, all_ = Visible.causal(T, window=20, device=device), Visible.causal(T, device=device)
    sink = torch.arange(T, device=device) < 4
    visible = Visible(near.label, near.first, near.end, all_.first, all_.end.where(sink, all_.first))
    return attention(q, k, v, visible=visible, return_lse=True, backend=backend)


SPECS = (
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
    replace(
        _attention("attention_visible", {}, {"H": 4, "Hk": 2, "K": 16, "V": 32}, {"H": 1, "Hk": 1, "K": 64, "V": 8}),
        function=_with_sinks,
        packed=False,
    ),
    _attention("attention_both_ways", {"causal": False}, {"H": 2, "Hk": 1, "K": 16, "V": 16}),
)
