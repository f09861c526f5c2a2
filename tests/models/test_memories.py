"""Models whose state learns at test time: their sizes part by part, what outliers do, and 100,000 tokens."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zoo


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "gates"), [("yaad", 3), ("moneta", 2), ("memora", 2), ("titans", 3), ("ttt", 1), ("lact", 1)]
)
def test_parameters_part_by_part(name: str, gates: int) -> None:
    D, L, H, V, F = 32, 2, 4, 11, 48
    model = zoo.create_model(name, d_model=D, n_layers=L, n_heads=H, vocab_size=V, hidden_size=F)
    d = D // H
    memory = {"ttt": d * (d + 1), "lact": 3 * d * d}.get(name, 8 * d * d) * H
    norm = 0 if name == "lact" else 2 * D
    convolutions = 0 if name == "lact" else 3 * 4 * D
    window = 4 * D * D if name == "lact" else 0  # of attention beside it
    mixer = 5 * D * D + convolutions + memory + norm + gates * (D + 1) * H + d + window
    per_layer = mixer + 3 * D * F + 2 * D
    assert sum(p.numel() for p in model.parameters()) == 2 * V * D + D + L * per_layer


@pytest.mark.everything
def test_huber_survives_outliers_and_squares_and_cubes_do_not() -> None:
    """The claim for which Yaad has its loss; with clean values both learn the matrix to rounding."""
    outliers = benchmark("outliers")
    hit = {name: min(outliers.errors(name, 0.05, seed=0)) for name in outliers.LOSSES}
    assert hit["huber"] < 0.04
    assert hit["l2"] > 10 * hit["huber"]
    assert hit["l3"] > 50 * hit["huber"]
    assert max(min(outliers.errors(name, 0.0, seed=0)) for name in ("l2", "huber")) < 1e-10


@pytest.mark.everything
@pytest.mark.parametrize("name", ["yaad", "moneta", "memora", "titans"])
def test_a_hundred_thousand_tokens_in_bfloat16(name: str) -> None:
    """Where values can be learnt, the drift against float64 is the rounding of the outputs, at the end as at first."""
    with torch.no_grad():
        each, largest = benchmark("long_memory").drift(name, 100_000, 1.0, seed=0)
    assert max(each) < 0.02
    assert math.isfinite(largest)
