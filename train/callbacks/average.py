"""An average of the weights over the run: what validation measures, kept beside the weights themselves."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.train.callbacks.limits import update_done

__all__ = ["AverageWeights"]


class AverageWeights(Callback):
    """The exponential moving average of a model's parameters, with the bias of its start taken out, as Adam does.

    After update n it is the sum over k of (1 - decay) decay^(n - k) w_k, divided by 1 - decay^n: a mean over the
    updates so far, in which the initial weights have no part. It is float32 or better. While a validation runs, the
    model has the average. Cut weights (FSDP) are averaged where they lie; a checkpoint holds the whole average, so that
    a run resumes to the same numbers, under any strategy. Buffers are not averaged.

    Args:
        decay: of each update, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._average: dict[str, Tensor] = {}  # laid out as the parameters
        self._parameters: dict[str, nn.Parameter] = {}
        self._saved: dict[str, Tensor] = {}  # from a checkpoint, whole
        self._kept: dict[str, Tensor] = {}  # the weights, while the model has the average
        self._model: nn.Module | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters where a strategy has put them, and lay a saved average out like them."""
        model = pl_module.model
        assert isinstance(model, nn.Module)
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._average = {
            name: _like(self._saved[name], p)
            if self._saved
            else torch.zeros_like(p, dtype=_wide(p), requires_grad=False)
            for name, p in self._parameters.items()
        }
        self._saved = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the weights of an update in."""
        if not update_done(trainer, batch_idx):
            return
        self.updates += 1
        share = (1.0 - self.decay) / (1.0 - self.decay**self.updates)
        for name, p in self._parameters.items():
            average = self._average[name]
            average.lerp_(p.detach().to(average.dtype), share)

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model the average."""
        if not self.updates:
            return
        self._gather_nothing()
        for name, p in self._parameters.items():
            self._kept[name] = p.detach().clone()
            p.copy_(self._average[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the weights back; checkpoints are written after this."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the weights back, in case a validation was under way."""
        self._give_back()

    @torch.no_grad()
    def _give_back(self) -> None:
        self._gather_nothing()
        for name, weights in self._kept.items():
            self._parameters[name].copy_(weights)
        self._kept = {}

    def _gather_nothing(self) -> None:
        """Free what FSDP has gathered for a forward pass without a backward pass: it would be used again."""
        for module in self._modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _modules(self) -> Iterator[nn.Module]:
        return iter(()) if self._model is None else self._model.modules()

    def whole(self) -> dict[str, Tensor]:
        """{name of a parameter: its average}, on the CPU, in float32 or better. All ranks must call it."""
        return {name: _whole(average).cpu() for name, average in self._average.items()}

    def state_dict(self) -> dict[str, Any]:
        """The average, whole, and how many updates it is over."""
        return {"updates": self.updates, "average": self.whole()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the start of training."""
        self.updates, self._saved = int(state_dict["updates"]), dict(state_dict["average"])


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _like(saved: Tensor, p: Tensor) -> Tensor:
    """A whole tensor laid out as a parameter is: on its device, or cut across ranks."""
    moved = saved.to(p.device).clone()
    return distribute_tensor(moved, p.device_mesh, p.placements) if isinstance(p, DTensor) else moved
