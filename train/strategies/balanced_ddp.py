"""Plans of uneven sequences with the weights on every rank, whose gradients are averaged once an update."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from zoo.train.balance import CostModel
from zoo.train.strategies.balanced import Balanced
from zoo.train.strategies.balanced_fsdp import BalancedFSDPStrategy
from zoo.train.strategies.settings import PlanSettings
from zoo.train.strategies.weights import refuse_weights, with_weights

__all__ = ["BalancedStrategy"]

BUCKET = 32 << 20  # bytes of gradients that are summed at once: a copy of this size is made


class BalancedStrategy(Balanced, DDPStrategy):
    """Plans of uneven sequences with the weights on every rank.

    A batch of whole documents (`zoo.train.data.text.documents`) is planned over all ranks: which of them share which
    documents, in which order. Ranks may run unequal numbers of micro-steps, or none; any ranks may share a document.
    torch's DistributedDataParallel is not used: gradients are averaged once, after the last micro-step of an update.
    A task must therefore return (its summed loss) x ranks / (the targets of all ranks); `Task` does.

    Args:
        planner: "packed", all ranks share every step, for models without attention; "hybrid", rings of any size;
            "flexible" and "uniform", groups of powers of two in step; "auto": packed without attention, else hybrid.
        capacity: tokens that a rank runs at once; when omitted twice its share of a batch, or its share of the longest
            document on all ranks.
        chunk: cuts inside a ring are multiples of it; with attention it must be 1.
        method: how states cross ranks: allgather, lasp, lasp2 or zeco, see zoo.ops.shard.SequenceShard.
        attention: how softmax attention crosses ranks: lightseq, allgather, ring or tokenring.
        cost: what micro-steps cost, such as `refit` fits to measured ones; its capacity is replaced. When omitted it is
            nominal: the model's operations on a nominal device, see zoo.train.strategies.nominal.
        a1, a2, b1: coefficients in place of its own, see CostModel.
        weights: "ddp", on every rank; "fsdp" makes a `BalancedFSDPStrategy` with the settings that it takes.
        timeout: seconds after which a rank that does not answer ends the others.
        process_group_backend: "nccl" on CUDA and "gloo" elsewhere when omitted.
        start_method: how Lightning starts further processes, see DDPStrategy.

    Raises:
        UserError: a name that is not known, or settings that do not go together.
    """

    lockstep = False

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """A strategy of the class for these weights."""
        if cls is not BalancedStrategy:
            return super().__new__(cls)
        return with_weights(super().__new__(cls), BalancedFSDPStrategy, settings)

    def __init__(
        self,
        *,
        weights: str = "ddp",
        planner: str = "auto",
        capacity: int | None = None,
        chunk: int = 1,
        method: str = "allgather",
        attention: str = "lightseq",
        cost: CostModel | None = None,
        a1: float | None = None,
        a2: float | None = None,
        b1: float | None = None,
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ):
        refuse_weights(weights, self)
        self._configure(
            PlanSettings(
                planner=planner, capacity=capacity, chunk=chunk, method=method, attention=attention, cost=cost, a1=a1,
                a2=a2, b1=b1, timeout=timeout,
            )
        )  # fmt: skip
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
        )

    def setup_environment(self) -> None:
        """The process group, used once."""
        with self._clear_errors():
            super().setup_environment()
        self._meet()

    def configure_ddp(self) -> None:
        """Equal weights on all ranks; no wrapper, whose reduction would run among the messages of the last backward."""
        assert self.model is not None
        with torch.no_grad():
            in_buckets([*self.model.parameters(), *self.model.buffers()], lambda flat: dist.broadcast(flat, 0))

    def _begin(self, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # Lightning clears them, but only later
            for p in self._parameters():
                p.grad = None

    def _before_micro_step(self, last: bool) -> None:
        pass

    def _keep(self) -> None:
        self._gradients = [p.grad for p in self._parameters()]
        for p in self._parameters():
            p.grad = None

    def _finish(self) -> None:
        """Average over ranks, in buckets; what no rank has a gradient for keeps none."""
        parameters = self._parameters()
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.root_device)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        for p, somewhere in zip(parameters, has.tolist(), strict=True):
            if somewhere and p.grad is None:
                p.grad = torch.zeros_like(p)

        def average(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat /= self.world_size

        in_buckets([p.grad for p in parameters if p.grad is not None], average)


def in_buckets(tensors: Sequence[Tensor], change: Callable[[Tensor], object]) -> None:
    """Change tensors in place, about BUCKET bytes of one dtype at a time: one message for many small ones."""
    waiting: dict[torch.dtype, list[Tensor]] = {}

    def send(bucket: list[Tensor]) -> None:
        flat = _flatten_dense_tensors(bucket)
        change(flat)
        for x, new in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            x.copy_(new)
        bucket.clear()

    for x in tensors:
        bucket = waiting.setdefault(x.dtype, [])
        bucket.append(x)
        if sum(y.nbytes for y in bucket) >= BUCKET:
            send(bucket)
    for bucket in waiting.values():
        if bucket:
            send(bucket)
