"""Cross entropy per target, as a perplexity, and per byte of text."""

import math

from torch import Tensor

from zoo.train.metrics.metric import Ratio

__all__ = ["BitsPerByte", "MeanLoss", "Perplexity"]


class MeanLoss(Ratio):
    """A loss per scored target. `update(total, n_scored)`, both sums over the batch."""

    name = "loss"


class Perplexity(Ratio):
    """exp of the nats per scored target. `update(nll, n_scored)`."""

    name = "perplexity"
    digits = 2

    def compute(self) -> Tensor:
        """The perplexity so far: exp of the summed nats over the number of scored targets."""
        return (self.total / self.count).exp()


class BitsPerByte(Ratio):
    """Bits per byte of the text behind the scored targets. `update(nll, n_bytes)`."""

    name = "bits_per_byte"
    label = "bits/byte"

    def compute(self) -> Tensor:
        """nll / (ln 2 * n_bytes): comparable between tokenizers."""
        return self.total / (math.log(2) * self.count)
