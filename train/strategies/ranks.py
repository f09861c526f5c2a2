"""What all our strategies over many ranks share: lost ranks and operators that refuse are said in one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from zoo.errors import UserError

__all__ = ["ManyRanks", "silent", "user_errors"]

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|timeout|broken pipe", re.IGNORECASE)


@contextmanager
def user_errors() -> Iterator[None]:
    """What an operator refuses inside was asked for by the user's settings."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # an operator that cannot be cut so
        raise UserError(str(error)) from error


def silent(ranks: int) -> UserError:
    """A model whose layers never ask for their past would train, and be wrong."""
    return UserError(
        f"a model that is cut across {ranks} ranks must hand its state on; this one sent nothing in its first step: "
        "build its layers along time from zoo.ops, or use a strategy such as ddp"
    )


class ManyRanks(ParallelStrategy):
    """Every call in which ranks wait for each other, with one sentence for one that is gone."""

    @property
    def dp_size(self) -> int:
        """Ranks, or groups of them, with data of their own; declared by a subclass."""
        raise NotImplementedError

    def _stage(self) -> str:
        trainer = None if self.lightning_module is None else self.lightning_module._trainer
        return str(None if trainer is None else trainer.state.stage)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As Lightning's; a rank that is gone is said in one sentence."""
        with self._clear_errors():
            return super().backward(closure_loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's; a rank that is gone is said in one sentence."""
        with self._clear_errors():
            return super().optimizer_step(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's; a rank that is gone is said in one sentence."""
        with self._clear_errors():
            return super().reduce(*args, **kwargs)  # type: ignore[safe-super]

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
                raise
            raise UserError(
                f"rank {self.global_rank} of {self.world_size} lost another rank, which ended or did not answer within "
                f"strategy.timeout; see what that one said, then resume ({str(error).strip().splitlines()[0]})"
            ) from error
