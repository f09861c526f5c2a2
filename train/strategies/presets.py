"""Names for `Trainer(strategy=...)`: the files of configs/strategy, so that a preset is written once."""

import yaml
from lightning.pytorch.strategies import StrategyRegistry

from zoo.configs import ROOT
from zoo.train.strategies.ddp import ContextParallelStrategy
from zoo.train.strategies.fsdp import ContextParallelFSDPStrategy

__all__ = ["register"]

_STRATEGIES = {
    f"zoo.train.strategies.{cls.__name__}": cls for cls in (ContextParallelStrategy, ContextParallelFSDPStrategy)
}


def register() -> list[str]:
    """Enter the presets into Lightning's registry; again is harmless. Returns their names."""
    names = []
    for path in sorted((ROOT / "strategy").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        strategy = _STRATEGIES.get(settings.pop("_target_", ""))
        if strategy is None:
            continue
        names.append(path.stem)
        if path.stem not in StrategyRegistry:
            described = f"context parallelism over all ranks: {settings}"
            StrategyRegistry.register(path.stem, strategy, description=described, **settings)
    return names
