"""Lightning strategies that cut time across ranks; importing zoo.train enters their presets into Lightning's registry.

| file | its one idea |
|---|---|
| `settings.py` | what a strategy is told, checked and frozen |
| `weights.py` | where weights lie, as a setting: `weights="fsdp"` makes the class with cut weights |
| `ranks.py` | what all have: a lost rank and an operator that refuses are said in one sentence |
| `base.py` | the grid of ranks, the shard around every step, what both strategies refuse |
| `ddp.py` | `ContextParallelStrategy`: weights on every rank |
| `fsdp.py` | `ContextParallelFSDPStrategy`: weights cut over all ranks |
| `balanced.py` | plans of uneven documents, run micro-step by micro-step |
| `balanced_ddp.py` | `BalancedStrategy`: weights on every rank, gradients averaged once |
| `balanced_fsdp.py` | `BalancedFSDPStrategy`: weights cut over all ranks, all in step |
| `nominal.py` | what a plan's micro-steps cost before anybody has measured them |
| `batch.py` | which part of a batch a rank gets; whether its group holds the same one |
| `kinds.py` | how a model's layers cross ranks, by the operators that they declare |
| `presets.py` | names such as "zeco", and "zeco_fsdp" with cut weights, for `Trainer(strategy=...)` |
"""

from zoo.train.strategies.balanced_ddp import BalancedStrategy
from zoo.train.strategies.balanced_fsdp import BalancedFSDPStrategy
from zoo.train.strategies.ddp import ContextParallelStrategy
from zoo.train.strategies.fsdp import ContextParallelFSDPStrategy
from zoo.train.strategies.presets import register

__all__ = [
    "BalancedFSDPStrategy",
    "BalancedStrategy",
    "ContextParallelFSDPStrategy",
    "ContextParallelStrategy",
    "register",
]
