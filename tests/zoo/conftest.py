"""A small model, registered as a third party would, with a tied weight and both kinds of buffers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from zoo import registry


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    d_model: int = 8
    n_layers: int = 2
    dropout: float = 0.0
    tied: bool = True
    pattern: str | None = None
    dims: tuple[int, ...] = (1, 2)
    vocab_size: int = 11

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {self.n_layers}")


class Toy(nn.Module):
    def __init__(self, cfg: ToyConfig):
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(cfg.d_model, cfg.d_model)) for _ in range(cfg.n_layers))
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("made", torch.arange(4.0), persistent=False)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x), None

    def state_bytes(self, batch: int, length: int) -> int:
        return 4 * batch


def build_toy(cfg: ToyConfig) -> nn.Module:
    return Toy(cfg)


SIZES = {"tiny": {}, "big": {"d_model": 16, "dims": (3,)}}


@pytest.fixture(autouse=True)
def toy() -> Iterator[Callable[[ToyConfig], nn.Module]]:
    """The registry as it is without other tests' models, and one of these tests' own; put back afterwards."""
    before = dict(registry._registered)
    for name, entry in before.items():
        if not entry.build.__module__.startswith("zoo.models."):
            del registry._registered[name]
    registry._info_of_registered.cache_clear()
    registry.register("toy", config=ToyConfig, sizes=SIZES, tags=("toy", "recurrent"), paper="A toy")(build_toy)
    yield build_toy
    own = {n: e for n, e in registry._registered.items() if e.build.__module__.startswith("zoo.models.")}
    registry._registered.clear()
    registry._registered.update(before | own)
    registry._info_of_registered.cache_clear()
