"""Names for `Trainer(strategy=...)`: the files of configs/strategy, so that a preset is written once."""

from functools import partial

import yaml
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from zoo._deprecation import current_name
from zoo.configs import RENAMED, ROOT
from zoo.train.strategies.balanced_ddp import BalancedStrategy
from zoo.train.strategies.balanced_fsdp import BalancedFSDPStrategy
from zoo.train.strategies.ddp import ContextParallelStrategy
from zoo.train.strategies.fsdp import ContextParallelFSDPStrategy

__all__ = ["register"]

_STRATEGIES = {
    f"zoo.train.strategies.{cls.__name__}": (cls, what)
    for cls, what in (
        (ContextParallelStrategy, "context parallelism over all ranks"),
        (ContextParallelFSDPStrategy, "context parallelism over all ranks"),
        (BalancedStrategy, "plans of uneven sequences"),
        (BalancedFSDPStrategy, "plans of uneven sequences"),
    )
}


def register() -> list[str]:
    """Enter the presets into Lightning's registry; again is harmless. Returns their names."""
    names = []
    for path in sorted((ROOT / "strategy").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        found = _STRATEGIES.get(settings.pop("_target_", ""))
        if found is None:
            continue
        strategy, what = found
        names.append(path.stem)
        if path.stem not in StrategyRegistry:
            StrategyRegistry.register(path.stem, strategy, description=f"{what}: {settings}", **settings)
    for old, new in RENAMED.get("strategy", {}).items():
        if old not in StrategyRegistry:
            StrategyRegistry.register(old, partial(_by_old_name, old), description=f"the old name of {new}")
    return names


def _by_old_name(name: str) -> Strategy:
    """The strategy that an old name stands for, with a warning that names the new one."""
    strategy: Strategy = StrategyRegistry.get(current_name("strategy", name, RENAMED["strategy"]))
    return strategy
