"""What the files of tests/cases/ declare: mixers and models, with what their shared proofs need.

A file is named after an architecture and holds any of

    MIXERS = {"name": MixerCase(lambda: Mixer(D, ...)), "name-variant": MixerCase(..., tier=EVERYTHING)}
    MODELS = {"name": CausalCase({...}, published={"1.3b": 1_365_514_240})}

The files are found; nothing lists them. `make test` runs the tier DEFAULT, `make test-all` both.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.registry import model_info

__all__ = [
    "DEFAULT", "EVERYTHING", "SMALL", "CausalCase", "D", "EncoderCase", "EncoderDecoderCase", "MixerCase", "ModelCase",
    "VisionCase", "make_mixer", "make_model", "mixers", "models", "parametrize",
]  # fmt: skip

DEFAULT, EVERYTHING = "default", "everything"
D = 16  # width of the mixers
SMALL = {"d_model": 32, "n_layers": 2, "vocab_size": 50, "hidden_size": 48}
FOLDER = Path(__file__).parents[1] / "cases"


@dataclass(frozen=True)
class MixerCase:
    """A mixer of width D, small enough to be tested in seconds.

    Args:
        make: makes it.
        bidirectional: it sees both sides of every token and has no state.
        tier: DEFAULT for one case a mixer, EVERYTHING for variants.
    """

    make: Callable[[], nn.Module]
    bidirectional: bool = False
    tier: str = DEFAULT


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A registered model, or a hybrid of it; by itself a model of no kind below, which proves the contract of models.

    Args:
        fields: what it needs besides SMALL to be tested in seconds.
        name: the registered name; None for the name of the case.
        published: {size: number of parameters}, counted in the authors' own configuration or code.
        rounding: what float32 logits may differ by between two ways, over the largest; more than 1e-5 with the reason.
        tier: as for a mixer.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    rounding: float = 1e-5
    tier: str = DEFAULT


class CausalCase(ModelCase):
    """A causal language model: steps, padding, packing, streaming, batches, checkpointing, a loss that falls."""


class EncoderCase(ModelCase):
    """A model that sees both sides of every token: padding, packing, save and load."""


class VisionCase(ModelCase):
    """A model of pictures: any size, features, a fresh classifier, save and load, a loss that falls."""


class EncoderDecoderCase(ModelCase):
    """A model from one sequence to another: steps, lengths of the source, save and load, a loss that falls."""


@functools.cache
def _files() -> list[ModuleType]:
    loaded = []
    for path in sorted(FOLDER.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


@functools.cache
def mixers(*, bidirectional: bool | None = None) -> Mapping[str, MixerCase]:
    """{name: case} of all files; only those that see both sides, or only the others, where that is said."""
    cases = _joined("MIXERS")
    return {name: case for name, case in cases.items() if bidirectional in (None, case.bidirectional)}


@functools.cache
def models(kind: type[ModelCase] = ModelCase) -> Mapping[str, Any]:
    """{name: case} of all files, of one kind."""
    return {name: case for name, case in _joined("MODELS").items() if isinstance(case, kind)}


def _joined(table: str) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for module in _files():
        for name, case in getattr(module, table, {}).items():
            assert name not in joined, f"two files of tests/cases name a case {name!r}"
            joined[name] = case
    return joined


def parametrize(argument: str, cases: Mapping[str, Any], *, only: Callable[[str], bool] = bool) -> Any:
    """`pytest.mark.parametrize` over the names of cases; those of the tier EVERYTHING are marked."""
    chosen = [
        pytest.param(name, marks=[pytest.mark.everything] if case.tier == EVERYTHING else [])
        for name, case in cases.items()
        if only(name)
    ]
    return pytest.mark.parametrize(argument, chosen)


def make_mixer(name: str) -> nn.Module:
    """The mixer of a case, the same weights every time, in float64."""
    torch.manual_seed(0)
    return mixers()[name].make().double()


def make_model(name: str, **fields: Any) -> nn.Module:
    """The small model of a case, in eval mode, its weights far from the start's 0.02 so that every part matters."""
    case = models()[name]
    torch.manual_seed(0)
    registered = case.name or name
    small = {key: value for key, value in SMALL.items() if key in model_info(registered).fields}
    model = zoo.create_model(registered, **(small | dict(case.fields) | fields))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
