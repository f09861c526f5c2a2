"""Names for `Trainer(strategy=...)`: the files of configs/strategy, so that a preset is written once."""

from functools import partial
from typing import Any

import yaml
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from zoo._deprecation import current_name
from zoo.configs import RENAMED, ROOT, variants
from zoo.targets import TARGET
from zoo.train.strategies.balanced_ddp import BalancedStrategy
from zoo.train.strategies.ddp import ContextParallelStrategy

__all__ = ["register"]

_STRATEGIES = {
    f"zoo.train.strategies.{cls.__name__}": (cls, what)
    for cls, what in (
        (ContextParallelStrategy, "context parallelism over all ranks"),
        (BalancedStrategy, "plans of uneven sequences"),
    )
}


def register() -> list[str]:
    """Enter the presets into Lightning's registry; again is harmless. Returns their names."""
    presets: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "strategy").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if settings.get(TARGET) in _STRATEGIES:
            presets[path.stem] = settings
    for name, words in variants("strategy").items():
        presets[name] = presets[words["strategy"]] | {k.partition(".")[2]: v for k, v in words.items() if "." in k}
    for name, preset in presets.items():
        strategy, what = _STRATEGIES[preset[TARGET]]
        settings = {key: value for key, value in preset.items() if key != TARGET}
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, strategy, description=f"{what}: {settings}", **settings)
    for old, new in RENAMED.get("strategy", {}).items():
        if old not in StrategyRegistry:
            StrategyRegistry.register(old, partial(_by_old_name, old), description=f"the old name of {new}")
    return list(presets)


def _by_old_name(name: str) -> Strategy:
    """The strategy that an old name stands for, with a warning that names the new one."""
    strategy: Strategy = StrategyRegistry.get(current_name("strategy", name, RENAMED["strategy"]))
    return strategy
