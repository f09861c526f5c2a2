"""TTT: test-time training of a linear model or a two-layer network, in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from zoo.layers import TTT, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class TTTConfig(SequenceConfig):
    """Settings of TTT; those of the mixer are explained at `zoo.layers.TTT`."""

    n_heads: Annotated[int, Range(1)] = 4
    learner: Literal["linear", "mlp"] = "linear"
    chunk_size: Annotated[int, Range(1, 65_536)] = 16
    conv_size: Annotated[int | None, Range(1)] = 4
    eta_max: Annotated[float | None, Range(above=0)] = None
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output


_TINY = {"n_heads": 4, "hidden_size": 256, "vocab_size": 257}
_125M = {"d_model": 768, "n_layers": 12, "n_heads": 12}
_350M = {"d_model": 1024, "n_layers": 24, "n_heads": 16}
_760M = {"d_model": 1536, "n_layers": 24, "n_heads": 16}
_1_3B = {"d_model": 2048, "n_layers": 24, "n_heads": 32}


@register(
    "ttt",
    config=TTTConfig,
    sizes={
        "tiny": _TINY,
        "tiny_mlp": _TINY | {"learner": "mlp"},
        "125m": _125M,
        "125m_mlp": _125M | {"learner": "mlp"},
        "350m": _350M,
        "350m_mlp": _350M | {"learner": "mlp"},
        "760m": _760M,
        "760m_mlp": _760M | {"learner": "mlp"},
        "1.3b": _1_3B,
        "1.3b_mlp": _1_3B | {"learner": "mlp"},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "test-time"),
    paper="Sun et al., Learning to (Learn at Test Time), arXiv 2407.04620",
)
def ttt(config: TTTConfig) -> SequenceModel:
    """A state that is itself a model, trained by a step of gradient descent a token."""
    mixer = partial(
        TTT,
        n_heads=config.n_heads,
        learner=config.learner,
        chunk_size=config.chunk_size,
        conv_size=config.conv_size,
        eta_max=config.eta_max,
        norm_eps=config.output_norm_eps,
    )
    mixers = {"ttt": mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or "ttt", mixers))
