"""Context parallelism with the weights cut, too: FSDP2 over all ranks."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from zoo.ops.shard import Link
from zoo.train.data.core.base import Part
from zoo.train.strategies.base import ContextParallel
from zoo.train.strategies.settings import CrossingSettings

__all__ = ["ContextParallelFSDPStrategy", "CutWeights", "whole_weights"]

METHODS = ("encode", "hidden", "head", "head_loss")  # of a model, called beside its `forward`


class CutWeights(ModelParallelStrategy):
    """FSDP2 over all ranks, with checkpoints that are whole and in one file. `_weights_mesh` is made by a subclass."""

    def __init__(self, *, timeout: float, process_group_backend: str | None):
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self._weights_mesh: DeviceMesh | None = None

    def shard_weights(self, model: nn.Module) -> None:
        """Cut each block's weights over all ranks, then the rest; a second call changes nothing."""
        if isinstance(model, FSDPModule):
            return
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=self._weights_mesh)
        fully_shard(model, mesh=self._weights_mesh)
        for name in METHODS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, numbered as the optimiser itself numbers its parameters.

        Lightning's own numbers follow the model instead, and no other strategy could read them.
        """
        inner = _inner(optimizer)
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, inner, options=_whole())
        if self.global_rank != 0:
            return state
        number = {name: i for i, name in enumerate(n for group in state["param_groups"] for n in group["params"])}
        return {
            "state": {number[name]: value for name, value in state["state"].items()},
            "param_groups": [{**g, "params": [number[n] for n in g["params"]]} for g in state["param_groups"]],
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of this strategy or of one that keeps weights whole, and deal it out."""
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            inner = _inner(optimizer)
            order = [names[parameter] for group in inner.param_groups for parameter in group["params"]]
            named: dict[str, Any] = {
                "state": {order[i]: value for i, value in state["state"].items()},
                "param_groups": [{**g, "params": [order[i] for i in g["params"]]} for g in state["param_groups"]],
            }
            set_optimizer_state_dict(self.model, inner, named, options=options)
        return checkpoint


class ContextParallelFSDPStrategy(ContextParallel, CutWeights):
    """FSDP2 over data x context: time as in `ContextParallelStrategy`, weights and optimiser cut over all ranks.

    A task calls `trainer.strategy.shard_weights(model)` in its `configure_model`, as `Task` does.
    Gradients are averaged over all ranks, the convention of DDP. Checkpoints are whole and in one file, written by
    rank 0, so that a run resumes under any strategy. The groups of cut weights live as long as the weights.

    Args:
        cp_size, method, attention, layout, link, blocks, inner, schema, timeout, process_group_backend: as there.

    Raises:
        UserError: as there.
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
    ):
        self._configure(
            CrossingSettings(
                cp_size=cp_size, method=method, attention=attention, layout=layout, link=link or Link(), blocks=blocks,
                inner=inner, schema=schema, timeout=timeout,
            )
        )  # fmt: skip
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """The process group, the grid, and all of it in one row for the weights."""
        with self._clear_errors():
            self._setup_distributed()
        self._device_mesh = self._make_grid(("data_parallel", "cp"))
        # The flat mesh is kept: taking it from the grid by name is deprecated.
        self._weights_mesh = self._device_mesh._flatten("dp_cp")

    def _give_back(self) -> None:
        """The weights keep their groups."""
        self._mesh = self._place = None
        self._compared.clear()
        self._watched.clear()


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """A model's state dict on the first rank when its weights are cut, {} on the others; None when they are not.

    All ranks must call it.
    """
    if not isinstance(model, FSDPModule):
        return None
    state: dict[str, Any] = get_model_state_dict(model, options=_whole())
    return state if torch.distributed.get_rank() == 0 else {}


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimiser itself, without Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)
