"""Running a plan: a rank's micro-steps as batches, its places in rings, one gradient at the end.

Every micro-step is one call of the model inside zoo.ops.shard.use(...), on a packed stream of whole or cut documents,
followed at once by its backward pass. Losses are sums over tokens, divided by the number of scored targets of the whole
update, so that the gradient does not depend on the plan, and ranks may run unequal numbers of micro-steps: they meet
only inside rings and at the end.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.ops import shard
from zoo.train.balance.plan import Plan, RankStep

IGNORED = -100  # a target that is not scored
Batch = dict[str, Tensor]


class ProcessGroups:
    """Places in the rings of plans, which may have any ranks: messages go between pairs on the one global group.

    A plan in lockstep uses aligned powers of two. `nested` makes process groups of those, fewer than twice the ranks,
    so that what they gather is gathered by collectives.

    Args:
        method: how states cross ranks; see zoo.ops.shard.SequenceShard.
    """

    def __init__(self, method: str = "allgather"):
        self.method = method
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def nested(self) -> None:
        """Make all groups of 2, 4, 8, ... ranks that begin at a multiple of their size. All ranks call it."""
        world, size = dist.get_world_size(), 2
        while size <= world:
            for i in range(0, world - size + 1, size):
                ring = tuple(range(i, i + size))
                self._groups[ring] = dist.new_group(list(ring))
            size *= 2

    def place(self, ring: tuple[int, ...]) -> shard.SequenceShard | None:
        """This rank's place in a ring; None where it is alone. All ranks must have met before, as in `agree`."""
        if len(ring) == 1:
            return None
        if ring in self._groups:
            return shard.SequenceShard(self._groups[ring], method=self.method)
        return shard.SequenceShard(ranks=ring, method=self.method)


def agree(plan: Plan, group: dist.ProcessGroup | None = None) -> None:
    """Raise where ranks hold different plans: rings would wait for ever. One small all-gather.

    Raises:
        ValueError: on all ranks, naming those that differ from the first.
    """
    own = torch.tensor([int(plan.digest()[:15], 16)])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    other = [rank for rank, digest in enumerate(everyone) if not torch.equal(digest, everyone[0])]
    if other:
        raise ValueError(
            f"ranks {other} made another plan than rank 0: give all ranks the same lengths, planner, seed and versions"
        )


def micro_batch(step: RankStep, document: Callable[[int], Tensor]) -> Batch:
    """A rank's part of a micro-step: "tokens", "targets" (1, T) and "cu_seqlens", as every batch of zoo.

    Args:
        step: from `plan.for_rank(rank)`.
        document: name -> its tokens, (s,) int64. Targets are shifted before anything is cut, so that none is lost at a
            cut; the last token of a document has none.
    """
    tokens, targets = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for piece in step.pieces:
        whole = document(piece.document)
        shifted = torch.cat([whole[1:], whole.new_full((1,), IGNORED)])
        tokens.append(whole[piece.start : piece.end])
        targets.append(shifted[piece.start : piece.end])
    cu_seqlens = torch.tensor(step.cu_seqlens, dtype=torch.int32)
    return {"tokens": torch.cat(tokens)[None], "targets": torch.cat(targets)[None], "cu_seqlens": cu_seqlens}


def run_plan(
    model: nn.Module,
    plan: Plan,
    document: Callable[[int], Tensor],
    summed_loss: Callable[[nn.Module, Batch], Tensor],
    groups: ProcessGroups,
) -> Tensor:
    """Gradients of the mean loss of a plan's batch in `model`, the same on all ranks; returns that loss.

    Args:
        model: equal on all ranks; gradients are added to those that are there.
        plan: equal on all ranks (`agree`), for as many ranks as the world has.
        document: name -> its tokens.
        summed_loss: the loss of a micro-batch, summed over its scored targets. A micro-batch may have no token at all
            where a ring is longer than its stream has chunks.
        groups: how the plan's rings meet.

    Raises:
        ValueError: the plan is for another number of ranks.

    Cost: the plan's micro-steps, then one all-reduce of the gradients.
    """
    if plan.ranks != dist.get_world_size():
        raise ValueError(f"run_plan: a plan for {plan.ranks} ranks cannot run on {dist.get_world_size()}; plan anew")
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    total = torch.zeros(2, dtype=torch.float64)  # the loss, its targets
    for step in plan.for_rank(dist.get_rank()):
        batch = micro_batch(step, document)
        with shard.use(groups.place(step.ring)):
            loss = summed_loss(model, batch)
        loss.backward()
        total += torch.stack([loss.detach().double().cpu(), (batch["targets"] != IGNORED).sum().double()])
    dist.all_reduce(total)
    targets = max(float(total[1]), 1.0)
    for p, old in zip(parameters, before, strict=True):
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= targets
        if old is not None:
            p.grad += old
    return total[0] / targets
