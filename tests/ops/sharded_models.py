"""Every registered model by every method that its layers admit: three steps of training equal one process.

The table is made from the registry, so that a new model of tokens is in it by existing.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sharded_encoders
import torch
from sharded_cases import Errors, summed
from torch import Tensor, nn

import zoo
from zoo.layers.model import as_model
from zoo.ops import shard
from zoo.ops.core.spec import relative_error
from zoo.registry import list_models, model_info
from zoo.train.strategies.kinds import CONTIGUOUS, kinds

Check = Callable[[shard.SequenceShard], Errors]
LENGTH, VOCABULARY, STEPS = 24, 11, 3
DOCUMENTS = (0, 3, 19, 24)  # borders inside stretches, and one document over three ranks of four
# What a model is told, as far as it has such fields: small, and far from the start so that every part matters.
SMALL: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "vocab_size": VOCABULARY, "n_heads": 4, "head_dim": 8, "hidden_size": 24,
    "d_state": 4, "n_groups": 2, "init_std": 0.3, "dropout": 0.0,
}  # fmt: skip
HYBRIDS = {  # patterns of three layers
    "hybrid": "deltanet(n_heads=4), attention(n_heads=4, window=9), attention(n_heads=4, n_kv_heads=2)",
    "side by side": "(deltanet(n_heads=4) + attention(n_heads=4, window=9)) * 3",
}
CONTIGUOUS_ATTENTION = ("allgather", "ring", "ulysses", "tokenring", "lightseq")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in HYBRIDS:
        fields = SMALL | {"pattern": HYBRIDS[name], "n_layers": 3}
        name = "deltanet"
    else:
        fields = SMALL
    known = model_info(name).fields
    return zoo.create_model(name, **{key: value for key, value in fields.items() if key in known}).double()


def of_tokens_alone(name: str) -> bool:
    """Whether a model needs tokens and nothing else."""
    with torch.device("meta"):
        model = as_model(zoo.create_model(name))
    return [each.name for each in model.inputs if not each.optional] == ["tokens"]


def ways(name: str) -> dict[str, dict[str, Any]]:
    """The methods that a model's layers admit: {name: fields of the shard}."""
    found = set(kinds(build(name)))
    states, attends = bool(found & CONTIGUOUS), "attention" in found
    made: dict[str, dict[str, Any]] = {}
    if states:
        attention = {"attention": "lightseq"} if attends else {}
        made |= {method: {"method": method, **attention} for method in shard.METHODS}
        made["zeco"]["blocks"] = 3
    if attends and states:
        made |= {f"zeco and {a}": {"method": "zeco", "attention": a} for a in CONTIGUOUS_ATTENTION}
    elif attends:
        made |= {a: {"attention": a} for a in shard.ATTENTION if a != "usp"}
        made["tokenring, zigzag"] = {"attention": "tokenring", "layout": "zigzag"}
        made["usp"] = {"attention": "usp", "inner": 2}
    return made


def trained(model: nn.Module, step: Callable[[nn.Module], Tensor], reduce: Callable[[Any], list[Tensor]]) -> Errors:
    """Three steps of gradient descent with momentum on the summed gradients, in place."""
    parameters = list(model.parameters())
    momentum = [torch.zeros_like(p) for p in parameters]
    for _ in range(STEPS):
        loss = step(model)
        gradients = reduce(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momentum, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(0.02 * m)
    return {}


def model_check(place: shard.SequenceShard, name: str, way: dict[str, Any], packed: bool, dropped: bool) -> Errors:
    if way.get("inner") and place.size % way["inner"]:
        way = way | {"inner": place.size}
    documents = DOCUMENTS if packed else None
    here = replace(place, layout=way.get("layout"), length=LENGTH, documents=documents, **{
        key: value for key, value in way.items() if key != "layout"
    })  # fmt: skip
    own = shard.token_indices(LENGTH, place.rank, place.size, here.layout or "contiguous")
    generator = torch.Generator().manual_seed(1)
    tokens = as_model(build(name)).example(1 if packed else 2, LENGTH, seed=generator)["tokens"]
    targets = torch.randint(VOCABULARY, tokens.shape, generator=generator)
    targets[:, : LENGTH // 3] = -100  # on three and four ranks the first has nothing to learn from
    whole = torch.tensor(DOCUMENTS) if packed else None
    local = None
    if packed and here.layout == "contiguous":
        local = shard.local_boundaries(torch.tensor(DOCUMENTS), place.rank, place.size, LENGTH).cu_seqlens
    elif packed:  # one rank alone is not cut; several read the shard's documents
        local = whole if place.size == 1 else torch.tensor([0, len(own)])

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        scores = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        return scores / LENGTH

    one = build(name)
    many = copy.deepcopy(one)
    with shard.use(None if dropped else here):
        logits, _ = many(tokens[:, own], cu_seqlens=local)
    errors = {"output": relative_error(logits, one(tokens, cu_seqlens=whole)[0][:, own])}
    exact = torch.autograd.grad(loss_of(one(tokens, cu_seqlens=whole)[0], targets), list(one.parameters()))

    def step(model: nn.Module) -> Tensor:
        with shard.use(None if dropped else here):
            logits, _ = model(tokens[:, own], cu_seqlens=local)
        return loss_of(logits, targets[:, own])

    ours = summed(place, torch.autograd.grad(step(many), list(many.parameters())))
    for (key, _), a, b in zip(one.named_parameters(), ours, exact, strict=True):
        errors[f"d {key}"] = relative_error(a, b)
    trained(one, lambda m: loss_of(m(tokens, cu_seqlens=whole)[0], targets), list)
    trained(many, step, lambda g: summed(place, g))
    for (key, a), b in zip(many.named_parameters(), one.parameters(), strict=True):
        errors[f"{key} after {STEPS} steps"] = relative_error(a, b)
    return errors


def refusing(check: Check) -> Check:
    """An operator that has no heads to send says so, and that is all right."""

    def run(place: shard.SequenceShard) -> Errors:
        try:
            return check(place)
        except ValueError as error:
            if "this operator has none to send" not in str(error):
                raise
            return {"refused": 0.0}

    return run


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {}
    for name in [*filter(of_tokens_alone, list_models()), *HYBRIDS]:  # the others refuse, see tests/models
        found = ways(name)
        assert found, f"{name} has no way to be cut across ranks"
        for way, fields in found.items():
            packed = way in ("zeco", "lightseq", "zeco and ulysses", "zigzag")

            def run(place: shard.SequenceShard, n: str = name, f: Any = fields, p: bool = packed) -> Errors:
                return model_check(place, n, f, p, dropped=False)

            made[f"{name}, {way}"] = refusing(run) if way == "heads" else run
        made[f"dropped {name}"] = lambda place, n=name, f=next(iter(found.values())): model_check(
            place, n, f, packed=False, dropped=True
        )
    return made | sharded_encoders.checks()
