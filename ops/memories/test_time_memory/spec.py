"""What a memory that learns at test time must prove: five rules that differ in every choice.

A nonlinear memory is a dynamical system that may amplify rounding without bound, in every form alike. The proofs hold
in this regime, with the common tolerances: 200 tokens, keys of length 1 and 16 numbers, steps up to 0.1, a decay of
about 1/400 a token, values that are half a matrix times the key and half noise. In float32 the worst gradients are off
by 3e-6 (Memora 1e-5, Titans without decay 5e-5), those of the loop by as much.

Outside of it, over 200 tokens: with keys of 6 numbers and a decay of 1/50, 5e-3 (loop 8e-3); Memora with norm_eps 1e-6
and log weights of deviation 0.3 loses all digits, as its loop does. MLPs with a norm leave the regime where gates shut,
or start at 0: outputs of weights near 0 have no variance to divide by. Where values are noise alone, a difference of
1e-10 is one of 1 after 3,000 tokens at a decay of 1/200.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, randn
from zoo.ops.memories.test_time_memory import test_time_memory
from zoo.ops.memories.test_time_memory.algorithm import Momentum
from zoo.ops.memories.test_time_memory.loss import HuberLoss, LpLoss
from zoo.ops.memories.test_time_memory.memory import MatrixMemory, MLPMemory
from zoo.ops.memories.test_time_memory.retention import LqRetention, SoftmaxRetention
from zoo.ops.memories.test_time_memory.rule import MemoryRule
from zoo.ops.memories.test_time_memory.state import MemoryState

_MLP = MLPMemory(expansion=2)
YAAD = MemoryRule(memory=_MLP, loss=HuberLoss(), chunk_size=16)
MONETA = MemoryRule(memory=_MLP, loss=LpLoss(3), retention=LqRetention(4), chunk_size=7)
MEMORA = MemoryRule(
    memory=MLPMemory(expansion=2, norm_eps=1e-2), retention=SoftmaxRetention(), chunk_size=16, reads="chunk"
)
MATRIX = MemoryRule(memory=MatrixMemory(residual=False, norm=False), chunk_size=4)
TITANS = MemoryRule(memory=_MLP, algorithm=Momentum(), chunk_size=16)


def _values(sizes: Sizes) -> int:
    """Numbers of a value, as many as of a key unless said otherwise."""
    return sizes.get("V", sizes["D"])


def _start(rule: MemoryRule, n: int, sizes: Sizes) -> tuple[Tensor, ...]:
    """Accumulators at which a sequence begins, the same for the same sizes."""
    generator, H = torch.Generator().manual_seed(7), sizes["H"]
    shapes = rule.memory.shapes(sizes["D"], _values(sizes))
    drawn = [randn(generator, H, *shape).expand(n, H, *shape) for shape in shapes]
    if not rule.retention.linear:
        return tuple(drawn)
    return tuple(rule.retention.start(x * x.shape[-1] ** -0.5) for x in drawn)


@functools.wraps(test_time_memory)
def _with_named_start(*, outer: Tensor, inner: Tensor | None = None, **given: Any) -> Any:
    """The start by the names of its matrices, for a proof's inputs are tensors."""
    return test_time_memory(**given, start=(outer,) if inner is None else (outer, inner))


def _empty(rule: MemoryRule, state: MemoryState) -> MemoryState:
    """The state at the start, of as many rows and of the sizes of another one."""
    n, H, V, _ = state.weights[0].shape
    weights = _start(rule, n, {"H": H, "D": state.weights[-1].shape[3], "V": V})
    nothing = (torch.zeros_like(x) for x in (*state.momentum, state.chunk, state.filled))
    *momentum, chunk, filled = nothing
    return MemoryState(tuple(x.to(state.chunk) for x in weights), tuple(momentum), chunk, filled)


def _inputs(rule: MemoryRule, B: int, T: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    H, D = sizes["H"], sizes["D"]
    k = F.normalize(randn(generator, B, T, H, D), dim=-1)
    truth = randn(generator, H, _values(sizes), D)
    made = {
        "q": F.normalize(randn(generator, B, T, H, D), dim=-1),
        "k": k,
        "v": 0.7 * (torch.einsum("hvk,bthk->bthv", truth, k) + randn(generator, B, T, H, _values(sizes))),
        "eta": 0.1 * torch.rand(B, T, H, generator=generator, dtype=torch.float64),
        "g": F.logsigmoid(randn(generator, B, T, H) + 6),
    }
    if rule.memory.norm:
        made |= {"gain": 1 + 0.1 * randn(generator, H, D), "offset": 0.1 * randn(generator, H, D)}
    if rule.algorithm.momentum:
        made["theta"] = F.logsigmoid(randn(generator, B, T, H))
    if rule.loss.thresholded:
        made["delta"] = 1 + D**0.5 * torch.rand(B, T, H, generator=generator, dtype=torch.float64)
    return made | dict(zip(("outer", "inner"), (x[0] for x in _start(rule, 1, sizes)), strict=False))


def _state(rule: MemoryRule, n: int, sizes: Sizes, generator: torch.Generator) -> MemoryState:
    """Somewhere inside a chunk, in each row at another place."""
    C = rule.chunk_size
    start = tuple(x + 0.1 * x.std() * randn(generator, *x.shape) for x in _start(rule, n, sizes))
    sums = tuple(0.1 * randn(generator, *x.shape) for x in start) if rule.algorithm.momentum else ()
    filled = torch.randint(C, (n,), generator=generator)
    made = _inputs(rule, n, C, sizes, generator)
    gates = torch.stack([made[name] for name in rule.gates], dim=-1)
    chunk = torch.cat([made["k"], made["v"], gates], dim=-1).transpose(1, 2)
    there = torch.arange(C) < filled[:, None]
    return MemoryState(start, sums, chunk * there[:, None, :, None], filled)


def _entry(word: str, rule: MemoryRule, **more: Callable[[Inputs], Inputs]) -> OperatorSpec:
    gates = tuple(name for name in rule.gates if name not in ("eta", "g"))
    return OperatorSpec(
        name=f"test_time_memory{word}",
        function=functools.partial(_with_named_start, rule=rule),
        make=functools.partial(_inputs, rule),
        state=functools.partial(_state, rule),
        empty=functools.partial(_empty, rule),
        sizes=({"H": 2, "D": 16} if rule.memory.residual else {"H": 2, "D": 6, "V": 5},),
        time=("q", "k", "v", "eta", "g", *gates),
        extremes={
            "no steps": lambda i: i | {"eta": i["eta"] * 0},
            "no decay": lambda i: i | {"g": i["g"] * 0},
            **{name.replace("_", " "): edge for name, edge in more.items()},
        },
        # Rounding grows in networks, by chance. In float32 over five seeds, errors of 1e-6 to 5e-5 are 0.2 to 2.7 times
        # those of the float32 loop; a test of its own holds their mean to 1, where it is 0.73 to 0.94.
        bounded_by_the_loop=rule is MATRIX,
    )


SPECS = (
    _entry(
        "",
        YAAD,
        small_thresholds=lambda i: i | {"delta": i["delta"] * 1e-2},
        large_thresholds=lambda i: i | {"delta": i["delta"] * 1e3},
    ),
    _entry("_moneta", MONETA),
    _entry("_memora", MEMORA),
    _entry("_titans", TITANS, lasting_momentum=lambda i: i | {"theta": i["theta"] * 1e-2}),
    _entry("_matrix", MATRIX, shut_gates=lambda i: i | {"g": i["g"] * 0 - 8}),
)
