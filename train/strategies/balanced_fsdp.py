"""Plans of uneven sequences with the weights cut over all ranks: every rank runs every micro-step."""

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from zoo.train.balance import CostModel
from zoo.train.strategies.balanced import Balanced
from zoo.train.strategies.fsdp import CutWeights
from zoo.train.strategies.settings import PlanSettings

__all__ = ["BalancedFSDPStrategy"]


class BalancedFSDPStrategy(Balanced, CutWeights):
    """Plans of uneven sequences with the weights cut over all ranks: FSDP2, every rank runs every micro-step.

    As `BalancedStrategy`, with plans in lockstep alone: a rank without work in a micro-step runs an empty one, since
    all gather the weights. Gradients are summed once, in the last micro-step's backward pass of every batch.

    Args:
        planner: as there but for "hybrid"; "auto" is "flexible" with attention.
        capacity, chunk, method, attention, cost, a1, a2, b1, timeout, process_group_backend: as there.

    Raises:
        UserError: as there.
    """

    lockstep = True

    def __init__(
        self,
        *,
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
    ):
        self._configure(
            PlanSettings(
                planner=planner, capacity=capacity, chunk=chunk, method=method, attention=attention, cost=cost, a1=a1,
                a2=a2, b1=b1, timeout=timeout,
            )
        )  # fmt: skip
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """The process group, used once, and all ranks in one row for the weights."""
        with self._clear_errors():
            self._setup_distributed()
        self._device_mesh = init_device_mesh(
            self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",)
        )
        self._weights_mesh = self._device_mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        self._meet()

    def _begin(self, batch_idx: int) -> None:
        pass

    def _before_micro_step(self, last: bool) -> None:
        """Until the last one gradients stay with the gathered weights, where Lightning does not clear them."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
                module.set_is_last_backward(last)

    def _keep(self) -> None:
        pass

    def _finish(self) -> None:
        pass
