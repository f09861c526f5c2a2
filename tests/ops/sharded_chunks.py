"""Chunks of attention that edges of ranks cut in their middle.

MEGA and TCNCA with chunks of 1, 4, 5 and 8 tokens. Stretches of 24 tokens over 1 to 4 ranks begin with chunks of 4, and
inside those of 5.
"""

from collections.abc import Callable
from unittest import mock

import sharded_models
from sharded_cases import Errors

from zoo.ops import shard

FIELDS = {"d_key": 6, "d_value": 10, "conv_size": 3, "growth": 2, "n_levels": 3}


def check(name: str, chunk: int, packed: bool, dropped: bool) -> Callable[[shard.SequenceShard], Errors]:
    """Three steps of training of the small model against one process."""

    def run(place: shard.SequenceShard) -> Errors:
        with mock.patch.dict(sharded_models.SMALL, FIELDS | {"chunk_size": chunk}):
            return sharded_models.model_check(place, name, {"method": "zeco"}, packed, dropped)

    return run


def silent(place: shard.SequenceShard) -> Errors:
    """MEGA's averages cross as states; its attention sends no halo where stretches begin with chunks, else it does."""
    sent = []
    for chunk in (1, 5):
        seen: list[shard.Message] = []
        with shard.observed(seen.append):
            check("mega", chunk, packed=False, dropped=False)(place)
        sent.append(sum(message.what == "halo" for message in seen))
    assert place.size == 1 or sent[1] > 0
    return {"halos": float(sent[0])}


def checks() -> dict[str, Callable[[shard.SequenceShard], Errors]]:
    """Names that start with "dropped" must fail on more than one rank."""
    made = {
        f"{name}, chunks of {chunk}, packed {packed}": check(name, chunk, packed, dropped=False)
        for name in ("mega", "tcnca")
        for chunk in (1, 4, 5, 8)
        for packed in (False, True)
    }
    made["no halo"] = silent
    return made | {f"dropped {name}": check(name, 5, packed=False, dropped=True) for name in ("mega", "tcnca")}
