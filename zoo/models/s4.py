"""S4 and S4D as language models: time-invariant state spaces, one per channel."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from zoo.layers import S4, SequenceConfig, SequenceModel, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class S4Config(SequenceConfig):
    """Settings of S4 and S4D; those of the mixer are explained at `zoo.layers.S4`."""

    hidden_size: int | None = 0
    d_state: Annotated[int, Range(2)] = 64
    mode: str = "diag"  # diag: S4D; dplr: S4
    init: str | None = None  # legs, lin, inv or real; None: lin for diag, legs for dplr
    rule: str | None = None  # zoh or bilinear; None: zoh for diag, bilinear for dplr
    n_ssm: Annotated[int | None, Range(1)] = None  # None: every channel has its own A and B
    dt_min: Annotated[float, Range(above=0)] = 1e-3
    dt_max: Annotated[float, Range(above=0)] = 1e-1
    dropout: float = 0.0  # on the residual branch, and inside the mixer of whole channels, the same at all times
    ssm_lr: Annotated[float | None, Range(0)] = 1e-3  # A, B, P and dt learn no faster than this

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min must be at most dt_max = {self.dt_max}, got {self.dt_min}")


@register(
    "s4",
    config=S4Config,
    sizes={
        "tiny": {"n_layers": 8, "vocab_size": 257, "tie_embeddings": True},
        "tiny-dplr": {"n_layers": 8, "vocab_size": 257, "tie_embeddings": True, "mode": "dplr", "n_ssm": 1},
    },
    task="language_modelling",
    data="pydocs",
    decoder="sampling",
    produces="text",
    tags=("causal", "recurrent", "ssm"),
    paper="Gu, Goel and Re, Efficiently Modeling Long Sequences with Structured State Spaces, arXiv 2111.00396",
)
def s4(config: S4Config) -> SequenceModel:
    """A linear time-invariant state space per channel, trained as a convolution as long as the sequence."""
    mixer = partial(
        S4,
        d_state=config.d_state,
        mode=config.mode,
        init=config.init,
        rule=config.rule,
        n_ssm=config.n_ssm,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dropout=config.dropout,
        lr=config.ssm_lr,
    )
    return SequenceModel(
        config, layer_mixers(config.d_model, config.n_layers, config.pattern or "s4", {"s4": mixer})
    )  # fmt: skip
