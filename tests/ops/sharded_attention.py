"""Softmax attention cut across ranks by every method: one process's numbers, and nothing sent twice."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import sharded_attention_bytes
import torch
from sharded_cases import Errors, like, summed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.ops import Visible, attention, shard
from zoo.ops.attention.attention.parallel import local
from zoo.ops.core.recompute import contexts
from zoo.ops.core.spec import relative_error

Check = Callable[[shard.SequenceShard], Errors]
EVEN, UNEVEN, SHORT = 24, 29, 3  # a multiple of 2 P for every P; of none; less than ranks
DOCUMENTS = {EVEN: (0, 5, 11, 11, 22, 24), UNEVEN: (0, 3, 20, 21, 29)}
WINDOW = 5
WAYS: dict[str, dict[str, Any]] = {
    "allgather": {"attention": "allgather"},
    "allgather, zigzag": {"attention": "allgather", "layout": "zigzag"},
    "allgather, striped": {"attention": "allgather", "layout": "striped"},
    "ring": {"attention": "ring"},
    "zigzag": {"attention": "zigzag"},
    "striped": {"attention": "striped"},
    "ulysses": {"attention": "ulysses"},
    "ulysses, zigzag": {"attention": "ulysses", "layout": "zigzag"},
    "usp": {"attention": "usp"},
    "usp, zigzag": {"attention": "usp", "layout": "zigzag"},
    "tokenring": {"attention": "tokenring"},
    "tokenring, zigzag": {"attention": "tokenring", "layout": "zigzag"},
    "lightseq": {"attention": "lightseq"},
}
CONTIGUOUS = [way for way in WAYS if not any(layout in way for layout in ("zigzag", "striped"))]
GROUPED = (4, 2)  # query and key heads
OTHER_HEADS = ((4, 4), (4, 1), (6, 3))


def placed(place: shard.SequenceShard, way: str, length: int, *, packed: bool = False) -> shard.SequenceShard:
    fields = {"layout": None, **WAYS[way], "length": length, "documents": DOCUMENTS[length] if packed else None}
    if way.startswith("usp"):
        fields["inner"] = 2 if place.size % 2 == 0 else 1
    return replace(place, **fields)


def own(place: shard.SequenceShard, length: int, rank: int | None = None) -> Tensor:
    return shard.token_indices(length, place.rank if rank is None else rank, place.size, place.layout or "contiguous")


def qkv(length: int, heads: tuple[int, int], batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads[0], 4), (batch, length, heads[1], 4), (batch, length, heads[1], 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def equals_one(
    place: shard.SequenceShard, length: int, *, heads: tuple[int, int] = GROUPED, causal: bool = True,
    window: int | None = None, packed: bool = False, cross: bool = True, used_by_last: bool = False,
) -> Errors:  # fmt: skip
    """Outputs, log-sum-exps and gradients against the definition on the whole sequence.

    With `used_by_last` only the last rank uses the log-sum-exp: the others must answer it in the backward.
    """
    x = qkv(length, heads, batch=1 if packed else 2)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": 0.7, "return_lse": True}
    cu = torch.tensor(DOCUMENTS[length]) if packed else None
    o, lse = attention(*x, **options, cu_seqlens=cu, backend="reference")
    do, dlse, tokens = like(o, 1), like(lse, 2), own(place, length)
    for rank in range(place.size - 1 if used_by_last else 0):
        dlse[:, own(place, length, rank)] = 0.0
    whole = torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), x)

    with shard.use(place) if cross else nullcontext():
        o_, lse_ = attention(*(y[:, tokens] for y in x), **options)
    loss = (o_ * do[:, tokens]).sum()
    if not used_by_last or place.rank == place.size - 1:
        loss = loss + (lse_ * dlse[:, tokens]).sum()
    errors = {"output": relative_error(o_, o[:, tokens]), "lse": relative_error(lse_, lse[:, tokens])}
    parts = torch.autograd.grad(loss, x)
    for name, ours, exact in zip("qkv", summed(place, parts), whole, strict=True):
        errors[f"d {name}"] = relative_error(ours, exact)
    return errors


def masks() -> dict[str, Visible]:
    """Masks that have no name: two streams, trees, two intervals in any order, and a mask for each row."""
    generator = torch.Generator().manual_seed(3)
    label, first, more = (torch.randint(0, 9, (2, EVEN), generator=generator) for _ in range(3))
    return {
        "two streams": Visible.block_diffusion(EVEN // 2, 4),
        "tree": Visible.tree([max(-1, i // 2 - 1) for i in range(EVEN)]),
        "band": Visible.band(EVEN, 3, 6),
        "two intervals": Visible(label, first, first + more, more, more + first // 2),
    }


def under(visible: Visible, tokens: Tensor) -> Visible:
    """The labels and intervals of these queries and keys."""
    return Visible(visible.label[:, tokens], *(x[:, tokens] for each in visible.intervals for x in each))


def labelled(place: shard.SequenceShard, name: str, *, cross: bool = True, recompute: bool = False) -> Errors:
    """Attention under a Visible against the definition on the whole sequence."""
    x, visible, tokens = qkv(EVEN, GROUPED, 2), masks()[name], own(place, EVEN)
    o, lse = attention(*x, visible=visible, return_lse=True, backend="reference")
    lse = lse.nan_to_num(neginf=0.0)
    do, dlse = like(o, 1), like(lse, 2)
    whole = torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), x)
    here = under(visible, tokens)

    def run(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*(y * 1.0 for y in parts), visible=here, return_lse=True)

    with shard.use(place) if cross else nullcontext():
        parts = [y[:, tokens] for y in x]
        made = checkpoint(run, *parts, use_reentrant=False, context_fn=contexts()) if recompute else run(*parts)
    o_, lse_ = made[0], made[1].nan_to_num(neginf=0.0)
    errors = {"output": relative_error(o_, o[:, tokens]), "lse": relative_error(lse_, lse[:, tokens])}
    gradients = torch.autograd.grad((o_ * do[:, tokens]).sum() + (lse_ * dlse[:, tokens]).sum(), x)
    for key, ours, exact in zip("qkv", summed(place, gradients), whole, strict=True):
        errors[f"d {key}"] = relative_error(ours, exact)
    return errors


def low_precision(place: shard.SequenceShard, way: str) -> Errors:
    """bfloat16 inputs: what a cut adds to one process's error is a rounding of the end, not one of every block."""
    x = [y.detach().bfloat16().requires_grad_() for y in qkv(EVEN, GROUPED, 2)]
    exact = [y.detach().double().requires_grad_() for y in x]
    o = attention(*exact, backend="reference")
    do, tokens = like(o, 1).bfloat16(), own(place, EVEN)
    whole = torch.autograd.grad(o, exact, do.double())
    with shard.use(place):
        o_ = attention(*(y[:, tokens] for y in x))
    parts = torch.autograd.grad(o_, x, do[:, tokens])
    found = [relative_error(o_, o[:, tokens])]
    found += [relative_error(a, b) for a, b in zip(summed(place, [g.double() for g in parts]), whole, strict=True)]
    return {"over 2**-8": max(0.0, max(found) - 2**-8)}


# -- models -----------------------------------------------------------------------------------------------------------

SMALL = {"d_model": 32, "n_layers": 2, "hidden_size": 24, "vocab_size": 11, "init_std": 0.3}
TRANSFORMER = SMALL | {"n_heads": 4, "n_kv_heads": 2}
HYBRID = SMALL | {"n_heads": 2, "head_dim": 8, "pattern": "gated_deltanet, attention(n_heads=4)"}


def model(
    place: shard.SequenceShard, name: str, fields: dict[str, Any], length: int = EVEN, *, cross: bool = True,
    recompute: bool = False,
) -> Errors:  # fmt: skip
    """Logits and parameter gradients of a whole model, and the keys in its state."""
    torch.manual_seed(0)
    net = zoo.create_model(name, activation_checkpointing=recompute, **fields).double()
    cuts = None if place.documents is None else torch.tensor(place.documents)
    tokens, here = torch.randint(11, (2 if cuts is None else 1, length)), own(place, length)
    logits, state = net(tokens, cu_seqlens=cuts)
    upstream = like(logits, 1)
    whole = torch.autograd.grad((logits * upstream).sum(), list(net.parameters()))
    local_cuts = None
    if cuts is not None and place.layout == "contiguous":
        local_cuts = shard.local_boundaries(cuts, place.rank, place.size, length).cu_seqlens
    with shard.use(place) if cross else nullcontext():
        logits_, state_ = net(tokens[:, here], cu_seqlens=local_cuts)
    parts = torch.autograd.grad((logits_ * upstream[:, here]).sum(), list(net.parameters()))
    errors = {"logits": relative_error(logits_, logits[:, here])}
    if cuts is None and "window" not in fields:
        errors["own keys"] = relative_error(state_[-1].k, state[-1].k[:, here])
    for (key, _), ours, exact in zip(net.named_parameters(), summed(place, parts), whole, strict=True):
        errors[f"d {key}"] = relative_error(ours, exact)
    return errors


def recomputation(place: shard.SequenceShard, way: str) -> Errors:
    """With activation checkpointing no message more, and no block attended to twice.

    Ulysses and USP fetch in the backward what a recomputation did not bring: four messages more a neighbour.
    """
    place = placed(place, way, EVEN)
    sent, blocks = [], []
    for recompute in (False, True):
        seen: list[shard.Message] = []
        with shard.observed(seen.append), mock.patch.object(local, "forward", wraps=local.forward) as forward:
            model(place, "transformer", TRANSFORMER | {"n_layers": 1}, recompute=recompute)
        sent.append(sum(message.kind != "receive" for message in seen))
        blocks.append(forward.call_count)
    assert place.size == 1 or (blocks[0] > 0 and sent[0] > 0)
    near = {"ulysses": place.size, "usp": place.inner or 1}.get(place.attention, 1)
    return {"exchanges": abs(sent[1] - sent[0] - 4 * (near - 1)), "blocks": abs(blocks[1] - blocks[0])}


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusals(place: shard.SequenceShard) -> Errors:
    """What a method cannot do says so, on every rank."""
    if place.size == 1:
        return {"silent": 0}
    P = place.size
    x = torch.zeros(1, 4, 1, 2)
    even = {"length": 4 * P}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"attention": "ulysses"}, {}, f"at least one query head for each of {P} ranks; got 1, use 'usp'"),
        ({"attention": "usp"}, {}, f"give SequenceShard inner, a divisor of its {P} ranks"),
        ({"attention": "usp", "inner": P}, {}, f"at least one query head for each of {P} ranks; got 1"),
        ({"attention": "lightseq"}, {"causal": False}, "causal=False, use another method"),
        ({"attention": "lightseq", "layout": "zigzag"}, {}, "got layout 'zigzag'"),
        ({"attention": "zigzag", "length": 4 * P + 1}, {}, f"a multiple of {2 * P}; got {4 * P + 1}, pad"),
        ({"attention": "ring", "length": 5 * P}, {}, f"holds 5 of {5 * P} tokens; got 4"),
        ({"documents": (0, 4 * P + 1)}, {}, f"end at T = {4 * P}; got 0 and {4 * P + 1}"),
        ({}, {"cu_seqlens": torch.tensor([0, 4])}, "give SequenceShard documents"),
        ({}, {"key_lengths": torch.tensor([4])}, "no others; got T = 4, S = 4, key_lengths"),
        ({"attention": "tokenring"}, {"visible": Visible.causal(4)}, "takes visible by 'allgather' or a ring"),
        ({"documents": (0, 4 * P)}, {"visible": Visible.causal(4)}, "got documents of the shard, use 'allgather'"),
        ({}, {"backend": "reference"}, "run in plain torch; got backend 'reference'"),
    ]
    silent = 0
    for fields, options, words in cases:
        try:
            with shard.use(replace(place, **{"layout": None} | even | fields)):
                attention(x, x, x, **options)
        except ValueError as error:
            silent += words not in str(error)
        else:
            silent += 1
    net = zoo.create_model("transformer", **SMALL)
    _, state = net(torch.zeros(1, 4, dtype=torch.long))
    try:
        with shard.use(place):
            net(torch.zeros(1, 4, dtype=torch.long), state)
    except ValueError as error:
        silent += "got a state, leave it out" not in str(error)
    else:
        silent += 1
    try:
        replace(place, attention="usp", inner=P + 1)
    except ValueError as error:
        silent += f"inner must divide the {P} ranks; got {P + 1}" not in str(error)
    else:
        silent += 1
    return {"silent": silent}


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {}

    def case(way: str, length: int, **options: Any) -> None:
        name = f"{way}, {length}, {', '.join(f'{key} {value}' for key, value in options.items())}"
        packed = options.get("packed", False)
        made[name] = lambda place: equals_one(placed(place, way, length, packed=packed), length, **options)

    for way, packed, window, causal in itertools.product(WAYS, (False, True), (None, WINDOW), (True, False)):
        if causal or way != "lightseq":
            case(way, EVEN, packed=packed, window=window, causal=causal)
    for way, packed, window in itertools.product(CONTIGUOUS, (False, True), (None, WINDOW)):
        case(way, UNEVEN, packed=packed, window=window)
    for way, heads in itertools.product(WAYS, OTHER_HEADS):
        case(way, EVEN, heads=heads, packed=heads == (4, 1))
    for way in WAYS:
        case(way, EVEN, used_by_last=True)
        made[f"{way}, bfloat16"] = lambda place, w=way: low_precision(placed(place, w, EVEN), w)
        made[f"transformer, {way}"] = lambda place, w=way: model(
            placed(place, w, EVEN, packed=True), "transformer", TRANSFORMER
        )
        if "," not in way:
            made[f"recomputation, {way}"] = lambda place, w=way: recomputation(place, w)
    for way in CONTIGUOUS:
        case(way, SHORT)
        case(way, SHORT, window=2)
        made[f"hybrid, {way}"] = lambda place, w=way: model(
            placed(place, w, UNEVEN, packed=True), "gated_deltanet", HYBRID, UNEVEN, recompute=True
        )
    made["transformer, window"] = lambda place: model(
        placed(place, "ring", UNEVEN), "transformer", TRANSFORMER | {"window": 20}, UNEVEN
    )
    made["transformer, zigzag, batch"] = lambda place: model(placed(place, "zigzag", EVEN), "transformer", TRANSFORMER)
    for way in ("ring", "zigzag"):
        made[f"dropped {way}"] = lambda place, w=way: equals_one(placed(place, w, EVEN), EVEN, cross=False)
    made["dropped transformer"] = lambda place: model(
        placed(place, "zigzag", EVEN), "transformer", TRANSFORMER, cross=False
    )
    for name in masks():
        for way in ("allgather", "allgather, zigzag", "ring", "zigzag", "striped"):
            made[f"visible {name}, {way}"] = lambda place, n=name, w=way: labelled(placed(place, w, EVEN), n)
    for way, after in (("allgather", ""), ("ring", ", ring")):
        made[f"visible recomputed{after}"] = lambda place, w=way: labelled(
            placed(place, w, EVEN), "two streams", recompute=True
        )
    made["dropped visible"] = lambda place: labelled(placed(place, "allgather", EVEN), "two streams", cross=False)
    made |= sharded_attention_bytes.checks()
    made["refusals"] = refusals
    return made
