"""Miras: Moneta, Yaad and Memora, three networks that learn at test time, in LLaMA's block."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from zoo.layers import Memora, Moneta, SequenceConfig, SequenceModel, Yaad, layer_mixers
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class MirasConfig(SequenceConfig):
    """What the three share; settings of their mixers are explained at `zoo.layers.memory_mixer.MemoryMixer`."""

    n_heads: Annotated[int, Range(1)] = 4
    expansion: Annotated[float, Range(above=0, most=64)] = 4.0
    chunk_size: Annotated[int, Range(1, 65_536)] = 16
    conv_size: Annotated[int | None, Range(1)] = 4
    eta_max: Annotated[float, Range(above=0)] = 0.3
    keep: Annotated[float, Range(above=0, below=1)] = 0.999
    output_norm_eps: Annotated[float, Range(0)] = 1e-5  # of the norm over each head's output

    def mixer_settings(self) -> dict[str, Any]:
        """The arguments that the three mixers share."""
        return {
            "n_heads": self.n_heads, "expansion": self.expansion, "chunk_size": self.chunk_size,
            "conv_size": self.conv_size, "eta_max": self.eta_max, "keep": self.keep, "norm_eps": self.output_norm_eps,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MonetaConfig(MirasConfig):
    """Settings of Moneta; those of the mixer are explained at `zoo.layers.Moneta`."""

    p: Annotated[float, Range(1)] = 3.0
    q: Annotated[float, Range(above=1)] = 4.0
    eta_max: Annotated[float, Range(above=0)] = 0.1
    keep: Annotated[float, Range(above=0, below=1)] = 0.9999


@dataclass(frozen=True, kw_only=True)
class YaadConfig(MirasConfig):
    """Settings of Yaad; those of the mixer are explained at `zoo.layers.Yaad`."""

    huber: Literal["norm", "switch", "coordinate"] = "norm"


@dataclass(frozen=True, kw_only=True)
class MemoraConfig(MirasConfig):
    """Settings of Memora; those of the mixer are explained at `zoo.layers.Memora`."""

    exact: bool = False
    log_weights: Annotated[float, Range(0)] = 1.0
    memory_eps: Annotated[float, Range(above=0)] = 1e-2


def _sizes(name: str) -> dict[str, dict[str, Any]]:
    """The paper's, whose hybrid alternates with attention; its window is not given."""
    medium = {"d_model": 1024, "n_layers": 24, "n_heads": 16}
    return {
        "tiny": {"n_heads": 4, "hidden_size": 256, "vocab_size": 257},
        "170m": {"d_model": 768, "n_layers": 12, "n_heads": 16},
        "340m": medium,
        "340m_hybrid": medium | {"pattern": f"{name}, attention(window=2048)"},
        "780m": {"d_model": 1536, "n_layers": 24, "n_heads": 16},
    }


_COMMON: Any = {
    "task": "language_modelling",
    "data": "pydocs",
    "decoder": "sampling",
    "produces": "text",
    "tags": ("causal", "recurrent", "test-time"),
    "paper": "Behrouz et al., It's All Connected (Miras), arXiv 2504.13173",
}


def _model(config: MirasConfig, name: str, mixer: Any) -> SequenceModel:
    mixers = {name: mixer}
    return SequenceModel(config, layer_mixers(config.d_model, config.n_layers, config.pattern or name, mixers))


@register("moneta", config=MonetaConfig, sizes=_sizes("moneta"), **_COMMON)
def moneta(config: MonetaConfig) -> SequenceModel:
    """A deep memory with an l_p loss, whose weights are inverted by their norm."""
    return _model(config, "moneta", partial(Moneta, p=config.p, q=config.q, **config.mixer_settings()))


@register("yaad", config=YaadConfig, sizes=_sizes("yaad"), **_COMMON)
def yaad(config: YaadConfig) -> SequenceModel:
    """A deep memory that outliers do not move."""
    return _model(config, "yaad", partial(Yaad, huber=config.huber, **config.mixer_settings()))


@register("memora", config=MemoraConfig, sizes=_sizes("memora"), **_COMMON)
def memora(config: MemoraConfig) -> SequenceModel:
    """A deep memory whose weights are softmaxes."""
    own: dict[str, Any] = {"exact": config.exact, "log_weights": config.log_weights, "memory_eps": config.memory_eps}
    return _model(config, "memora", partial(Memora, **own, **config.mixer_settings()))
