"""Context parallelism with the weights on every rank."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import DDPStrategy

from zoo.ops.shard import Link
from zoo.train.data.core.base import Part
from zoo.train.strategies.base import ContextParallel

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
        schema: what each key of a batch holds, see zoo.train.data.core.base.BATCH; the data module's when omitted.
        timeout: seconds after which a rank that does not answer ends the others.
        process_group_backend: "nccl" on CUDA and "gloo" elsewhere when omitted.
        find_unused_parameters, gradient_as_bucket_view, static_graph: of torch's DistributedDataParallel.
        start_method: how Lightning starts further processes, see DDPStrategy.

    Raises:
        UserError: a name that is not known, or a cp_size that does not divide the ranks.
    """

    def __init__(
        self,
        *,
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
        self._configure(cp_size, method, attention, layout, link, blocks, inner, schema, timeout)
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
