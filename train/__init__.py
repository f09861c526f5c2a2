"""Training: tasks, data, strategies, callbacks. Importing it enters the strategies' names into Lightning's registry."""

from zoo.train.strategies.presets import register

register()
