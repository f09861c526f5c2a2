"""What micro-steps of a model cost before anybody has measured them: its own work, a nominal device."""

from typing import Any

from torch import nn

from zoo.train.balance.cost import CostModel, RingTraffic, StateHandOff
from zoo.train.contracts import model_of
from zoo.train.strategies.kinds import kinds

__all__ = ["nominal"]

# A planner compares times, so that only their ratios matter; these are round numbers of our own for one large GPU, a
# node's adapter and the launches of a layer's kernels, forward and backward. Measure, and fit them by `refit`.
FLOPS = 200e12  # a second
BANDWIDTH = 50e9  # bytes a second between two ranks
LAYER = 0.5  # ms a layer of one micro-step, whatever its tokens


def nominal(model: nn.Module, capacity: int) -> CostModel:
    """Coefficients from a model's size and its attention.

    Forward and backward are 6 operations per weight and token (tables of embeddings look up and count nothing), and
    6 H K s^2 for causal attention of H heads of K over s tokens; within a window of w it is 12 H K w per token. What
    linear mixers do beside their weights is left out. A ring passes keys and values by in bfloat16, three times.

    Args:
        model: with or without attention, or a task that has it as `model`.
        capacity: tokens that fit on a rank.
    """
    weights = sum(p.numel() for p in model.parameters())
    weights -= sum(table.weight.numel() for table in model.modules() if isinstance(table, nn.Embedding))
    layers = len(getattr(model_of(model), "blocks", ())) or 1
    linear, squared, passed = 6.0 * weights, 0.0, 0.0
    names = kinds(model).get("attention", set())
    for module in model.modules():
        if type(module).__name__ in names:
            layer: Any = module
            heads, size = getattr(layer, "n_heads", None), getattr(layer, "head_dim", None)
            # a layer of one's own: four square projections are what most have
            width = heads * size if heads and size else (sum(p.numel() for p in layer.parameters()) / 4) ** 0.5
            window = getattr(layer, "window", None)
            if window is None:
                squared += 6.0 * width
            else:
                linear += 12.0 * width * window
            passed += 3 * 2 * 2 * width * getattr(layer, "n_kv_heads", 1) / (heads or 1)
    return CostModel(
        a1=1e3 * squared / FLOPS,
        a2=1e3 * max(linear, 1.0) / FLOPS,
        b1=LAYER * layers,
        capacity=capacity,
        communication=RingTraffic(1e3 * passed / BANDWIDTH) if names else StateHandOff(),
    )
