"""What pLSTM on a line must prove."""

import torch

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, at_every, at_some, randn
from zoo.ops.linear_attention.plstm import plstm, plstm_summary


def _inputs(B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Gates as a layer makes them: the transition has either sign, many of them small."""
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    return {
        "q": randn(generator, B, T, H, K),
        "k": randn(generator, B, T, H, K),
        "v": randn(generator, B, T, H, V),
        "source": torch.sigmoid(randn(generator, B, T, H)),
        "transition": torch.tanh(2 * randn(generator, B, T, H)),
        "mark": torch.sigmoid(randn(generator, B, T, H)),
        "direct": torch.sigmoid(randn(generator, B, T, H)),
    }


SPECS = (
    OperatorSpec(
        name="plstm",
        function=plstm,
        make=_inputs,
        state=lambda n, sizes, generator: randn(generator, n, sizes["H"], sizes["K"], sizes["V"]),
        sizes=({"H": 2, "K": 8, "V": 16}, {"H": 1, "K": 64, "V": 64}, {"H": 3, "K": 5, "V": 3}),
        time=("q", "k", "v", "source", "transition", "mark", "direct"),
        extremes={
            "forget everything": lambda i: i | {"transition": i["transition"] * 0},
            "forget nothing": lambda i: i | {"transition": i["transition"] * 0 + 1},
            "turn at every step": lambda i: i | {"transition": i["transition"] * 0 - 1},
            "forget at some steps": lambda i: i | {"transition": at_some(i["transition"], 0.0)},
            "nearly forget": lambda i: i | {"transition": at_every(i["transition"] * 0 + 1, 4, 1e-12)},
            "closed gates": lambda i: i | {"source": at_some(i["source"], 0.0), "mark": at_some(i["mark"], 0.0)},
        },
        summary=lambda i, cu: plstm_summary(i["k"], i["v"], i["source"], i["transition"], cu_seqlens=cu),
        resets=lambda i, where: (
            i
            | {
                "transition": i["transition"].masked_fill(where.unsqueeze(-1), 0),
                "mark": i["mark"].masked_fill(where.unsqueeze(-1), 0),
            }
        ),
    ),
)
