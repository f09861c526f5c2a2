"""Documents of very different lengths for the tests of balanced strategies: a pure function of a seed."""

from typing import Any

import torch
from sharded_data import V
from torch import Tensor

from zoo.train.data.text.documents import TokenDocuments


def documents(count: int, seed: int) -> list[Tensor]:
    """Every fifth has 41 to 59 tokens, the others 2 to 15."""
    made = torch.Generator().manual_seed(seed)

    def between(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=made))

    return [torch.randint(V, (between(2, 16) if i % 5 else between(41, 60),), generator=made) for i in range(count)]


class Uneven(TokenDocuments):
    """Forty documents to train on and nine to judge by.

    Args:
        differ: another token on this rank's side, in a document of the first batch.
    """

    def __init__(self, *, differ: bool = False, seed: int = 0, **settings: Any):
        train = documents(40, 1)
        if differ:
            train = [torch.cat([x[:-1], (x[-1:] + 1) % V]) for x in train]
        settings = {"global_tokens": 120, "metrics": ("perplexity", "accuracy"), **settings}
        super().__init__(train, documents(9, 2), vocab_size=V, seed=seed, **settings)
