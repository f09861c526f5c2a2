"""What training asks of models, data and strategies that may not be zoo's own: members that they have or have not."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from zoo.codecs import Codec
from zoo.layers.memory import MemoryPlan
from zoo.tokenizers import Tokenizer

__all__ = [
    "CutsTime",
    "HasCodec",
    "HasModel",
    "HasSchema",
    "HasTokenizer",
    "MakesPlans",
    "TakesMemoryPlan",
    "codec_of",
    "model_of",
    "schema_of",
    "tokenizer_of",
]


@runtime_checkable
class HasTokenizer(Protocol):
    """Data that are text."""

    tokenizer: Tokenizer | None


@runtime_checkable
class HasCodec(Protocol):
    """Data that a codec makes tokens of."""

    codec: Codec


@runtime_checkable
class HasSchema(Protocol):
    """Data that say what the parts of a batch hold, see `zoo.train.data.core.base.BATCH`."""

    schema: Mapping[str, Any] | None


@runtime_checkable
class HasModel(Protocol):
    """A task: what it trains is its `model`."""

    model: nn.Module


@runtime_checkable
class TakesMemoryPlan(Protocol):
    """A model of zoo's blocks, which can be told what to keep for the backward pass."""

    @property
    def memory(self) -> MemoryPlan:
        """What is kept now."""

    def use_memory(self, plan: MemoryPlan) -> None:
        """Keep this much from now on."""


@runtime_checkable
class MakesPlans(Protocol):
    """A strategy that plans whole documents over all ranks."""

    @property
    def global_rank(self) -> int:
        """This process among all."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def planner_of(self, longest: int, global_tokens: int) -> Any:
        """The planner of data with this longest document and batches of so many tokens."""


@runtime_checkable
class CutsTime(Protocol):
    """A strategy that gives a rank a part of each sequence."""

    @property
    def layout(self) -> str:
        """Which tokens a rank holds."""


def tokenizer_of(data: object) -> Tokenizer | None:
    """The tokenizer of data that are text."""
    return data.tokenizer if isinstance(data, HasTokenizer) else None


def codec_of(data: object) -> Codec | None:
    """The codec of data that are made into tokens by one, other than text."""
    return data.codec if isinstance(data, HasCodec) else None


def schema_of(data: object) -> Mapping[str, Any] | None:
    """What data say of the parts of their batches; None where they say nothing."""
    return data.schema if isinstance(data, HasSchema) else None


def model_of(module: nn.Module) -> nn.Module:
    """The model of a task; a model itself."""
    return module.model if isinstance(module, HasModel) else module
