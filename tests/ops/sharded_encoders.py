"""Encoders whose time is cut across ranks: heads for whole sequences, padded batches, recomputed layers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sharded_cases import Errors, like, summed

import zoo
from zoo.ops import shard
from zoo.ops.core.spec import relative_error

Check = Callable[[shard.SequenceShard], Errors]
LENGTH = 23  # stretches are uneven
DOCUMENTS = (0, 3, 3, 19, 23)  # one is empty, one lies on three ranks of four
SMALL: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "vocab_size": 11, "d_state": 4, "head_dim": 8, "n_groups": 2, "dropout": 0.0,
    "init_std": 0.3,
}  # fmt: skip
PADDED = ((0, 23), (4, 21), (0, 9), (7, 23), (0, 0))  # where each row has tokens; the last has none


def encoder(
    place: shard.SequenceShard, *, packed: bool = False, padded: bool = False, dropped: bool = False,
    recompute: bool = False, method: str = "zeco", **fields: Any,
) -> Errors:  # fmt: skip
    """Logits and all gradients; logits of whole sequences are on every rank, so their gradients are divided by it."""
    torch.manual_seed(0)
    model = zoo.create_model("hydra", **SMALL, **fields, activation_checkpointing=recompute).double()
    whole, local, mask = None, None, None
    left, right = shard.stretch(LENGTH, place.rank, place.size)
    rows = len(PADDED) if padded else 1 if packed else 2
    if packed:
        whole = torch.tensor(DOCUMENTS)
        local = shard.local_boundaries(whole, place.rank, place.size, LENGTH).cu_seqlens
    if padded:
        mask = torch.zeros(rows, LENGTH, dtype=torch.bool)
        for row, (first, last) in zip(mask, PADDED, strict=True):
            row[first:last] = True
    tokens = torch.randint(11, (rows, LENGTH))
    logits, _ = model(tokens, mask=mask, cu_seqlens=whole)
    upstream = like(logits, 1)
    exact = torch.autograd.grad((logits * upstream).sum(), list(model.parameters()))
    here = replace(place, method=method, length=LENGTH, documents=DOCUMENTS if packed else None)
    with shard.use(None if dropped else here):
        logits_, _ = model(
            tokens[:, left:right], mask=None if mask is None else mask[:, left:right], cu_seqlens=local
        )  # fmt: skip
    if "n_classes" in fields:
        loss = (logits_ * upstream).sum() / place.size
    else:
        logits, loss = logits[:, left:right], (logits_ * upstream[:, left:right]).sum()
    errors = {"logits": relative_error(logits_, logits)}
    parts = torch.autograd.grad(loss, list(model.parameters()))
    for (key, _), ours, want in zip(model.named_parameters(), summed(place, parts), exact, strict=True):
        errors[f"d {key}"] = relative_error(ours, want)
    return errors


def one_rank_alone(place: shard.SequenceShard) -> Errors:
    """`total` under a loss of the last rank: the others answer with what they do not ask for."""
    x = torch.arange(3.0, dtype=torch.float64).requires_grad_()
    with shard.use(place):
        y = shard.total(x * (place.rank + 1))
    weight = 1.0 if place.rank + 1 == place.size else 0.0
    (d,) = torch.autograd.grad((weight * y.square()).sum(), x)
    factor = place.size * (place.size + 1) / 2
    return {
        "sum": relative_error(y, factor * x),
        "d x": relative_error(d, 2 * factor * (place.rank + 1) * x),
    }


def refusals(place: shard.SequenceShard) -> Errors:
    """A mask with holes, and one of another shape, on every rank."""
    model = zoo.create_model("hydra", **SMALL)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    hole = torch.ones(1, 4, dtype=torch.bool)
    hole[0, 1] = False
    silent = 0
    for mask, words in ((hole, "has padding on either side only"), (hole[:, :3], "mask must be (B, T)")):
        with shard.use(place):
            try:
                model(tokens, mask=mask)
            except ValueError as error:
                silent += words not in str(error)
            else:
                silent += 1
    return {"silent": silent}


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {
        "total": one_rank_alone,
        "encoder refusals": refusals,
        "encoder, padded": lambda place: encoder(place, padded=True),
        "encoder, padded, lasp": lambda place: encoder(place, padded=True, method="lasp"),
        "encoder, padded, recomputed": lambda place: encoder(place, padded=True, recompute=True),
        "encoder, recomputed": lambda place: encoder(place, recompute=True),
        "encoder, recomputed, lasp2, packed": lambda place: encoder(place, recompute=True, packed=True, method="lasp2"),
        "encoder, prenorm": lambda place: encoder(place, prenorm=True),
        "dropped encoder": lambda place: encoder(place, dropped=True),
    }
    for pooling in ("first", "mean"):
        fields = {"n_classes": 5, "pooling": pooling}
        made[f"classes, {pooling}"] = lambda place, f=fields: encoder(place, **f)
        made[f"classes, {pooling}, packed"] = lambda place, f=fields: encoder(place, packed=True, **f)
        made[f"classes, {pooling}, padded"] = lambda place, f=fields: encoder(place, padded=True, **f)
        made[f"dropped classes, {pooling}"] = lambda place, f=fields: encoder(place, dropped=True, **f)
    return made
