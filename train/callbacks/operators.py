"""Which backend every operator of a run takes, and why."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.ops.core.call import Choice, Operator, watched

__all__ = ["ReportOperators", "describe_choices"]


class ReportOperators(Callback):
    """Watches the operators of the first training step, the forward pass and the backward pass, and reports once.

    Args:
        report: called with {name of the operator: what ran first, and why}, in the order of the calls; not called for
            a model without operators.
    """

    def __init__(self, report: Callable[[Mapping[str, Choice]], None]) -> None:
        self._report = report
        self._choices: dict[str, Choice] = {}
        self._watching = ExitStack()
        self._begun = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to watch, at the first batch."""
        if not self._begun:
            self._begun = True
            self._watching.enter_context(watched(self._note))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what was seen, after the first batch."""
        self._watching.close()
        if self._choices:
            self._report(self._choices)
            self._choices = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A first step that fails is watched no longer."""
        self._watching.close()

    def _note(self, operator: Operator, choice: Choice, outermost: bool) -> None:
        self._choices.setdefault(operator.name, choice)


def describe_choices(choices: Mapping[str, Choice]) -> str:
    """One line: the operators by what runs them, "causal_conv1d, ssd by triton (tensors on cuda)"."""
    names: dict[Choice, list[str]] = {}
    for name, choice in choices.items():
        names.setdefault(choice, []).append(name)
    return "; ".join(f"{', '.join(sorted(ops))} by {backend} ({why})" for (backend, why), ops in names.items())
