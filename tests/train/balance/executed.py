"""Four gloo processes that run plans and compare with one process; started as a script by test_execute.py.

Writes FOLDER/errors.json: {"gradients": {case: worst relative error}, "rings": plans passed, ...}.
"""

import faulthandler
import json
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from balancing.execute import IGNORED, Batch, ProcessGroups, agree, run_plan
from torch import Tensor, nn

import zoo
from zoo.ops.core.spec import relative_error
from zoo.train.balance import CostModel, Flexible, Group, Hybrid, PackedStream, Plan, RingTraffic, Uniform

RANKS = 4
PLANS = 200
HANGS_AFTER = 280  # seconds; then every process says where it stands
COST = CostModel(a1=2e-2, a2=0.1, b1=1.0, capacity=16, communication=RingTraffic(0.01))
DEAR = replace(COST, communication=RingTraffic(2.0))  # short sequences stay on one rank


def tokens_of(document: int, length: int) -> Tensor:
    return torch.randint(11, (length,), generator=torch.Generator().manual_seed(document))


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    net: Any = model
    hidden, _ = net.encode(batch["tokens"], cu_seqlens=batch["cu_seqlens"])
    return net.head_loss(hidden, batch["targets"], ignore_index=IGNORED, reduction="sum")


def tiny(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(
        name, d_model=16, n_layers=2, n_heads=2, hidden_size=24, vocab_size=11, init_std=0.3, **fields
    ).double()  # fmt: skip


def gradients(model: nn.Module, plan: Plan, groups: ProcessGroups) -> float:
    """The worst relative error of the loss and of any gradient against the documents run one by one here."""
    lengths = dict(zip(plan.documents, plan.lengths, strict=True))
    parameters = list(model.parameters())

    def document(name: int) -> Tensor:
        return tokens_of(name, lengths[name])

    total, scored = torch.zeros((), dtype=torch.float64), 0
    for name in plan.documents:
        x = document(name)
        if len(x) > 1:
            logits = model(x[None])[0][0, :-1]
            total = total + nn.functional.cross_entropy(logits, x[1:], reduction="sum")
            scored += len(x) - 1
    assert scored == plan.valid_tokens
    whole = torch.autograd.grad(total / scored, parameters)
    model.zero_grad()
    loss = run_plan(model, plan, document, summed_loss, groups)
    errors = [relative_error(loss, (total / scored).detach())]
    for p, exact in zip(parameters, whole, strict=True):
        assert p.grad is not None
        errors.append(relative_error(p.grad, exact))
    return max(errors)


def plans() -> dict[str, Plan]:
    rng = np.random.default_rng(5)
    body = rng.integers(1, 14, 14)
    lengths = [41, 1, *body.tolist(), 30, 2]  # 41 tokens take 3 ranks
    return {
        "hybrid": Hybrid(RANKS, COST)(lengths),
        "hybrid, naive": Hybrid(RANKS, COST, balance="tokens")(lengths),
        "hybrid, chunks": Hybrid(RANKS, COST, chunk=4)(lengths),
        "flexible": Flexible(RANKS, DEAR)([*lengths, 27]).named(range(100, 101 + len(lengths))),
        "uniform": Uniform(RANKS, COST)(lengths),
        "packed stream": PackedStream(RANKS, 16, chunk=4)(lengths),
        "a ring longer than its stream": PackedStream(RANKS, 16, chunk=8)([7, 5]),
        "ranks without work": Hybrid(RANKS, COST)([9]),
    }


def properties(found: dict[str, Plan]) -> dict[str, bool]:
    """What the plans must have, else the comparison says little."""

    def counts(plan: Plan) -> set[int]:
        return {len(plan.for_rank(r)) for r in range(RANKS)}

    rings = {len(g.ranks) for step in found["hybrid"].steps for g in step}
    sizes = [{len(g.ranks) for g in step} for step in found["flexible"].steps]
    return {
        "unequal steps": len(counts(found["hybrid"])) > 1,
        "a ring of three": 3 in rings,
        "groups of different sizes in one step": any(len(step) > 1 for step in sizes),
        "equal steps": len(counts(found["packed stream"])) == 1,
        "documents cut": any(p.start > 0 for s in found["packed stream"].for_rank(1) for p in s.pieces),
    }


def random_plan(rng: np.random.Generator) -> Plan:
    """Steps of disjoint groups of any ranks."""
    steps, n = [], 0
    for _ in range(rng.integers(1, 7)):
        ranks, groups = rng.permutation(RANKS).tolist(), []
        while ranks:
            size = int(rng.integers(1, len(ranks) + 1))
            ring, ranks = sorted(ranks[:size]), ranks[size:]
            if rng.random() < 0.8:
                groups.append(Group(tuple(ring), (n,)))
                n += 1
        steps.append(tuple(groups))
    return Plan(tuple(int(x) for x in rng.integers(1, 50, n)), RANKS, tuple(steps))


def ring_pass(plan: Plan) -> None:
    """Blocks travel around every ring by point-to-point messages on the one global group; all must arrive."""
    rank = dist.get_rank()
    for step in plan.for_rank(rank):
        size = len(step.ring)
        after, before = step.ring[(step.place + 1) % size], step.ring[(step.place - 1) % size]
        block = torch.tensor([step.step * RANKS + rank])
        seen = {int(block)}
        for _ in range(size - 1):
            arrived = torch.empty_like(block)
            for request in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, block, after), dist.P2POp(dist.irecv, arrived, before)]
            ):
                request.wait()
            block = arrived
            seen.add(int(block))
        assert seen == {step.step * RANKS + r for r in step.ring}


def refused(call: Callable[[], object], words: str) -> bool:
    try:
        call()
    except ValueError as error:
        return words in str(error)
    return False


def process(rank: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = ProcessGroups()
    groups.nested()
    nested = len(groups._groups)
    found: dict[str, Any] = {"gradients": {}, "dropped": {}}
    made = plans()
    found["properties"] = properties(made)
    for plan in made.values():
        agree(plan)
        plan.check(COST.capacity)
    rings = {g.ranks for name in ("flexible", "uniform", "packed stream") for step in made[name].steps for g in step}
    found["properties"]["nested groups suffice"] = nested == 3 and {r for r in rings if r[1:]} <= set(groups._groups)
    for case, plan in made.items():
        found["gradients"][f"deltanet, {case}"] = gradients(tiny("deltanet"), plan, groups)
    for case in ("hybrid", "flexible", "packed stream"):
        found["gradients"][f"gla, {case}"] = gradients(tiny("gla"), made[case], groups)
    recomputing = tiny("gla", activation_checkpointing=True)
    found["gradients"]["gla, hybrid, recomputed"] = gradients(recomputing, made["hybrid"], groups)
    with mock.patch("zoo.ops.shard.use", return_value=nullcontext()):
        for case in ("hybrid", "flexible", "packed stream"):
            found["dropped"][case] = gradients(tiny("deltanet"), made[case], groups)
    rng = np.random.default_rng(0)
    for _ in range(PLANS):
        ring_pass(random_plan(rng))
    found["rings"] = PLANS
    other = made["hybrid"].named(range(50, 50 + len(made["hybrid"].lengths))) if rank == 2 else made["hybrid"]
    found["refused"] = [
        refused(lambda: agree(other), "ranks [2] made another plan than rank 0"),
        refused(lambda: run_plan(tiny("gla"), Hybrid(2, COST)([3]), len, summed_loss, groups), "plan anew"),  # type: ignore[arg-type]
    ]
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, found)
    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # what was imported above is there already
    processes = [context.Process(target=process, args=(r, Path(sys.argv[1])), daemon=True) for r in range(RANKS)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    sys.exit(any(p.exitcode for p in processes))
