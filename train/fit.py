"""The public name of training: `zoo.train.fit.run` and `resume`. What they do is in `zoo.train.run.fit`."""

from zoo.train.run.fit import DONE, FAILED, INTERRUPTED, resume, run

__all__ = ["DONE", "FAILED", "INTERRUPTED", "resume", "run"]
