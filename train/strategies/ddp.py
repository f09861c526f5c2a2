"""Context parallelism with the weights on every rank, or cut over all ranks: `weights` chooses the class."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy

from zoo.ops.shard import Link
from zoo.train.data.core.base import Part
from zoo.train.strategies.base import ContextParallel
from zoo.train.strategies.fsdp import ContextParallelFSDPStrategy
from zoo.train.strategies.settings import CrossingSettings
from zoo.train.strategies.weights import refuse_weights, with_weights

__all__ = ["ContextParallelStrategy"]


class ContextParallelStrategy(ContextParallel, DDPStrategy):
    """DDP over data x context: `cp_size` neighbouring ranks share a sequence, each with its stretch of time.

    Any model whose layers along time are built from zoo.ops trains under it unchanged, to the numbers of one process.
    Gradients are averaged over all ranks, as DDP does. A task must therefore return (its summed loss) x ranks / (the
    targets of all ranks); `Task` does the division once, over a whole update.

    Args:
        cp_size: ranks that share a sequence, a divisor of all; None for all.
        method: how states cross ranks: allgather, lasp, lasp2, zeco or heads, see zoo.ops.shard.SequenceShard.
        attention: how softmax attention crosses ranks; "lightseq" when omitted, which suits hybrids.
        layout: which tokens a rank holds; that of the attention method when omitted.
        link: what a message costs; "zeco" chooses its number of blocks by it.
        blocks: of "zeco", in place of that choice.
        inner: of "usp", ranks of one head group; the divisor of cp_size next below its root when omitted.
        weights: "ddp", on every rank; "fsdp" makes a `ContextParallelFSDPStrategy` with the settings that it takes.
        schema: what each key of a batch holds, see zoo.train.data.core.base.BATCH; the data module's when omitted.
        timeout: seconds after which a rank that does not answer ends the others.
        process_group_backend: "nccl" on CUDA and "gloo" elsewhere when omitted.
        find_unused_parameters, gradient_as_bucket_view, static_graph: of torch's DistributedDataParallel.
        start_method: how Lightning starts further processes, see DDPStrategy.

    Raises:
        UserError: a name that is not known, or a cp_size that does not divide the ranks.
    """

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """A strategy of the class for these weights."""
        if cls is not ContextParallelStrategy:
            return super().__new__(cls)
        return with_weights(super().__new__(cls), ContextParallelFSDPStrategy, settings)

    def __init__(
        self,
        *,
        weights: str = "ddp",
        cp_size: int | None = None,
        method: str = "zeco",
        attention: str | None = None,
        layout: str | None = None,
        link: Link | None = None,
        blocks: int | None = None,
        inner: int | None = None,
        schema: Mapping[str, Part] | None = None,
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ):
        refuse_weights(weights, self)
        self._configure(
            CrossingSettings(
                cp_size=cp_size, method=method, attention=attention, layout=layout, link=link or Link(), blocks=blocks,
                inner=inner, schema=schema, timeout=timeout,
            )
        )  # fmt: skip
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
        )

    def setup_environment(self) -> None:
        """The process group, then the grid."""
        with self._clear_errors():
            super().setup_environment()
        self._make_grid(("dp", "cp"))
