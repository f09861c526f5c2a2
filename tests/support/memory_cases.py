"""What the proofs of memories that learn at test time share: choices, inputs and starts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import ops
from zoo.ops import (
    DotProductLoss,
    ElasticRetention,
    GatedMLPMemory,
    HuberLoss,
    KLLoss,
    L2Loss,
    LpLoss,
    LqRetention,
    MatrixMemory,
    MemoryRule,
    MirrorRetention,
    MLPMemory,
    RowNormRetention,
    SoftmaxRetention,
    WeightDecay,
)

memory = ops.test_time_memory  # by a name that pytest does not take for a test's
B, H, D = 2, 2, 12
PLAIN = MatrixMemory(residual=False, norm=False)
MLP = MLPMemory(expansion=2)
LOSSES = {
    "l2": L2Loss(),
    "l3": LpLoss(3),
    "l1.5": LpLoss(1.5),
    "huber": HuberLoss(),
    "huber by coordinate": HuberLoss("coordinate"),
    "huber by switch": HuberLoss("switch"),
    "dot": DotProductLoss(),
    "kl": KLLoss(),
}
MEMORIES = {
    "matrix": PLAIN,
    "matrix, norm, bias": MatrixMemory(bias=True),
    "mlp": MLP,
    "mlp, bias": MLPMemory(expansion=1.5, bias=True),
    "gated mlp": GatedMLPMemory(expansion=2, residual=False, norm=False),
    "gated mlp, norm": GatedMLPMemory(expansion=1),
}
RETENTIONS = {
    "decay": WeightDecay(),
    "l4": LqRetention(4),
    "l2.5": LqRetention(2.5),
    "mirror": MirrorRetention(4),
    "elastic": ElasticRetention(1e-2),
    "softmax": SoftmaxRetention(),
    "row norms": RowNormRetention(),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gates_of(rule: MemoryRule, T: int, rows: int = B) -> dict[str, Tensor]:
    made = {"eta": 0.1 * randn(rows, T, H, seed=4).sigmoid(), "g": F.logsigmoid(randn(rows, T, H, seed=5) + 5)}
    if rule.algorithm.momentum:
        made["theta"] = F.logsigmoid(randn(rows, T, H, seed=6))
    if rule.loss.thresholded:
        made["delta"] = 1 + randn(rows, T, H, seed=7).abs()
    return made


def inputs_of(rule: MemoryRule, T: int, rows: int = B) -> dict[str, Tensor]:
    q, k = (F.normalize(randn(rows, T, H, D, seed=i), dim=-1) for i in (1, 2))
    made = {"q": q, "k": k, "v": randn(rows, T, H, D, seed=3), **gates_of(rule, T, rows)}
    if rule.memory.norm:
        made |= {"gain": 1 + 0.1 * randn(H, D, seed=8), "offset": 0.1 * randn(H, D, seed=9)}
    return made


def start_of(rule: MemoryRule) -> tuple[Tensor, ...]:
    """Learnt accumulators (H, out, in): weights of about 1 over the root of the inputs, or log weights."""
    shapes = rule.memory.shapes(D, D)
    made = (randn(H, *shape, seed=20 + i) for i, shape in enumerate(shapes))
    if isinstance(rule.retention, SoftmaxRetention):
        return tuple(made)
    return tuple(rule.retention.start(x * x.shape[-1] ** -0.5) for x in made)


def leaves_of(rule: MemoryRule, T: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    given = {name: x.requires_grad_() for name, x in inputs_of(rule, T).items()}
    return given, tuple(x.requires_grad_() for x in start_of(rule))
