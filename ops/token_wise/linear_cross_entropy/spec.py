"""What the loss must prove."""

import functools
from collections.abc import Callable

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.token_wise.linear_cross_entropy import linear_cross_entropy


def _loss_inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Every fourth target is not scored, the first one is."""
    D, V = sizes["D"], sizes["V"]
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.arange(B * T).view(B, T) % 4 == 3] = -100
    return {
        "x": randn(generator, B, T, D),
        "weight": randn(generator, V, D) * D**-0.5,
        "bias": randn(generator, V),
        "targets": targets,
    }


_LOSS_EXTREMES: dict[str, Callable[[Inputs], Inputs]] = {
    "logits of hundreds": lambda i: i | {"weight": i["weight"] * 100},
    "a token that cannot be": lambda i: i | {"bias": i["bias"].index_fill(0, torch.tensor([1]), -1e4)},
    "all targets the same": lambda i: i | {"targets": i["targets"] * 0},
    "one scored": lambda i: i | {"targets": torch.where(torch.arange(i["targets"].numel()) == 5, i["targets"], -100)},
}


SPECS = (
    *(
        OperatorSpec(
            name=f"linear_cross_entropy_{reduction}",
            function=functools.partial(linear_cross_entropy, reduction=reduction),
            make=_loss_inputs,
            state=None,
            sizes=({"D": 8, "V": 17}, {"D": 70, "V": 300}),
            time=("x", "targets"),
            extremes=_LOSS_EXTREMES,
            packed=False,
            wide_output=True,
        )
        for reduction in ("mean", "none")
    ),
)
