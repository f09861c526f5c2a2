"""The public name of measuring a trained model. What it does is in `zoo.train.run.evaluate`."""

from zoo.train.run.evaluate import evaluate

__all__ = ["evaluate"]
