"""One sample, cut along time: what of a batch a rank of a context-parallel group gets."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops.shard import SequenceShard, local_boundaries, token_indices
from zoo.ops.shard.exchange import all_gather
from zoo.train.data.core.base import Part, Time

__all__ = ["LocalBatch", "cut", "refuse_different"]


class LocalBatch(dict[str, Any]):
    """A rank's part of a batch, and its place in the whole."""

    place: SequenceShard | None = None


def cut(batch: Any, schema: Mapping[str, Part], place: SequenceShard) -> LocalBatch:
    """The part of a batch that a rank of the group holds.

    Args:
        batch: the whole sample, the same on every rank of the group; targets already shifted.
        schema: what each key holds, see `zoo.train.data.core.base.BATCH`.
        place: the rank's place; its length and documents are those of the batch in the result.

    Raises:
        UserError: a batch that is not a dict, a key that the schema does not know, lengths that differ, fewer tokens
            than ranks, or a length that the layout cannot cut.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            "context parallelism cuts a batch by the names of its parts, so it must be a dict; got "
            f"{type(batch).__name__}, give for instance {{'tokens': ..., 'targets': ...}}"
        )
    unknown = sorted(set(batch) - set(schema))
    if unknown:
        raise UserError(
            f"context parallelism must know which parts of a batch have time; got {', '.join(map(repr, unknown))}, "
            "give the strategy a schema such as {'tokens': 1, 'weights': 'same'}"
        )
    timed = {
        key: part if isinstance(part, Time) else Time(part)
        for key, part in schema.items()
        if key in batch and not isinstance(part, str)
    }
    if not timed:
        raise UserError(
            f"context parallelism cuts sequences along time, and a batch of {', '.join(batch)} has none that may be "
            "cut; use strategy=ddp"
        )
    lengths = {_steps(key, batch[key], time) for key, time in timed.items()}
    if len(lengths) != 1:
        shapes = {key: tuple(batch[key].shape) for key in timed}
        raise UserError(f"all parts of a batch with time must have one length; got {shapes}")
    length = lengths.pop()
    if length < place.size:
        raise UserError(
            f"each of the {place.size} ranks of a context-parallel group needs a token; got sequences of {length}, "
            "lower cp_size or give longer sequences"
        )
    documents = next((batch[key] for key, part in schema.items() if part == "documents" and key in batch), None)
    place = replace(place, length=length, documents=None if documents is None else tuple(documents.tolist()))
    try:
        own = token_indices(length, place.rank, place.size, place.layout or "contiguous")
    except ValueError as error:
        raise UserError(str(error)) from error
    local = LocalBatch()
    local.place = place
    for key, value in batch.items():
        part = schema[key]
        if key in timed:
            # one piece of time is a view; a layout of several is copied
            local[key] = _taken(value, timed[key], own)
        elif part == "documents":
            local[key] = _boundaries(value, place, len(own))
        elif part == "once" and place.rank > 0:
            local[key] = torch.zeros_like(value)
        else:
            local[key] = value
    return local


def _steps(key: str, value: Tensor, time: Time) -> int:
    """Steps of time of a part.

    Raises:
        UserError: its size is no multiple of the unit.
    """
    size = value.shape[time.dim]
    if size % time.unit:
        raise UserError(
            f"{key} is cut in units of {time.unit}, which must divide its size {size}; choose data of another size"
        )
    return size // time.unit


def _taken(value: Tensor, time: Time, own: Tensor) -> Tensor:
    """The steps `own` of a part, in order."""
    dim, unit = time
    first, last = int(own[0]), int(own[-1]) + 1
    if last - first == len(own):
        return value.narrow(dim, first * unit, len(own) * unit)
    places = (own[:, None] * unit + torch.arange(unit)).flatten()
    return value.index_select(dim, places.to(value.device))


def _boundaries(cu_seqlens: Tensor, place: SequenceShard, tokens: int) -> Tensor:
    """The documents on this rank's stretch; where it holds none in one piece, attention asks the place instead."""
    if place.layout != "contiguous":
        return torch.tensor([0, tokens], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return local_boundaries(cu_seqlens, place.rank, place.size, place.length or 0).cu_seqlens


def refuse_different(batch: Any, place: SequenceShard, device: torch.device) -> None:
    """Raise on every rank of the group when they hold different samples."""
    own = torch.tensor([_fingerprint(batch)], dtype=torch.int64, device=device)
    lengths = [int(x) for x in all_gather(place, own)]
    if len(set(lengths)) > 1:
        others = [rank for rank, value in enumerate(lengths) if value != lengths[0]]
        raise UserError(
            f"all {place.size} ranks of a context-parallel group must hold the same sample before it is cut; ranks "
            f"{others} of the group got another than rank 0: shard the data by the strategy's "
            "distributed_sampler_kwargs and draw what is random by that rank"
        )


def _fingerprint(batch: Any) -> int:
    digest = hashlib.blake2b(digest_size=8)
    parts = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
    for key, value in parts:
        digest.update(repr((key, getattr(value, "shape", value))).encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
