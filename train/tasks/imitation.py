"""Imitation of an expert: chunks of actions from observations, judged by what the policy does in its world."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.layers.model import as_model
from zoo.layers.policy import Policy
from zoo.ranges import Range
from zoo.train.metrics import IGNORED, Accuracy, Ratio
from zoo.train.optim import Limits, Recipe
from zoo.train.robot_clip import draw_clip
from zoo.train.tasks.losses import Loss, summed_loss
from zoo.train.tasks.showing import evaluating
from zoo.train.tasks.task import Batch, Task
from zoo.train.tasks.trials import Trials, run_trials

__all__ = ["BorderJerk", "Imitation", "MalformedChunks", "SuccessRate", "TokensPerChunk"]

SHOWN = 8  # episodes of a clip


class SuccessRate(Ratio):
    """The part of the episodes that end as they should. `update(n_succeeded, n_episodes)`."""

    name = "success_rate"
    label = "success"
    better = "higher"


class MalformedChunks(Ratio):
    """The part of the predicted chunks that are none. `update(n_malformed, n_chunks)`."""

    name = "malformed_chunks"
    label = "malformed"


class BorderJerk(Ratio):
    """The mean absolute second difference of the actions over borders of chunks. `update(total, count)`."""

    name = "border_jerk"


class TokensPerChunk(Ratio):
    """Tokens of an expert's chunk, its end included. `update(n_tokens, n_chunks)`."""

    name = "tokens_per_chunk"
    label = "tokens/chunk"
    digits = 1


class Imitation(Task):
    """Mean cross entropy of the tokens of an expert's chunks.

    A batch holds "observations" (B, S, O) and "targets" (B, J), the tokens of the chunk that the expert would do next,
    -100 where there is none.

    Validation also lets the policy act: it sees, predicts a chunk, executes the first actions of it, and sees again.
    The episodes are the same every time, and are none of the demonstrations.

    Args:
        model: a policy, `model(observations=...) -> (logits (B, J, vocab_size), None)` with `act(observations)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: demonstrations with their world.
        trials: episodes in which validation lets the policy act; 0 for none.
        execute: actions of a chunk that are executed before the next one is predicted, up to the chunk's length.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model is no policy, or one for other chunks.
    """

    unit = "chunk"
    metric_classes = (Accuracy, SuccessRate, MalformedChunks, BorderJerk, TokensPerChunk)

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: Any,
        *,
        trials: Annotated[int, Range(0)] = 100,
        execute: Annotated[int, Range(1)] = 10,
        max_nonfinite_steps: int = 10,
    ) -> None:
        refuse_unless_policy(model, data)
        if not 1 <= execute <= data.chunk:
            raise UserError(
                f"task.execute must be between 1 and data.chunk={data.chunk}, the actions of a chunk; got {execute}: "
                "change one of the two"
            )
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)
        self.trials, self.execute = trials, execute
        self._attempt = make_attempt(data, execute)

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The size of an observation, the tokens of a chunk, and whether one of them ends it."""
        if "observations" not in data.schema:
            raise UserError(
                f"task=imitation needs an expert's observations and actions, and {type(data).__name__} has none; use "
                "data=reaching"
            )
        tokens = data.tokens
        return {
            "observation_size": data.world.observation_size,
            "n_slots": tokens.n_slots,
            "vocab_size": tokens.vocab_size,
            "ends": tokens.ends,
        }

    def prepared(self, batch: Batch, index: int, *, training: bool) -> Batch:
        """The tokens that an autoregressive policy reads are its targets, which it sees one step later."""
        return batch if "tokens" in batch else {**batch, "tokens": batch["targets"].clamp(min=0)}

    def losses_of(self, outputs: Any, batch: Batch) -> dict[str, Loss]:
        """All tokens of all chunks alike."""
        return {"tokens": Loss(*summed_loss(outputs, batch["targets"]))}

    def units(self, batch: Batch) -> int:
        """Chunks of a batch."""
        return as_model(self.model).units(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the loss; in front of the first one the policy acts."""
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        if batch_idx == 0 and self.trials:
            tried = self._attempt(self.model, self.trials)
            metrics["success_rate"].update(tried.succeeded.sum(), torch.tensor(len(tried.succeeded)))
            metrics["malformed_chunks"].update(torch.tensor(tried.malformed), torch.tensor(tried.chunks))
            metrics["border_jerk"].update(torch.tensor(tried.jerk), torch.tensor(tried.borders))
        batch = self.prepared(batch, batch_idx, training=False)
        logits, targets = self(batch), batch["targets"]
        self.add_losses(self.losses_of(logits, batch))
        scored = targets != IGNORED
        metrics["accuracy"].update(((logits.argmax(-1) == targets) & scored).sum(), scored.sum())
        metrics["tokens_per_chunk"].update(scored.sum(), scored.any(dim=1).sum())

    def show(self, model: nn.Module, data: Any, folder: Path, step: int | None = None) -> str | None:
        """A clip of the first episodes of the trials: robot.gif."""
        tried = make_attempt(data, self.execute)(model, SHOWN)
        path = folder / "robot.gif"
        draw_clip(path, tried.places, tried.succeeded.tolist())
        at = "" if step is None else f" at step {step}"
        return f"robot{at}: {int(tried.succeeded.sum())} of {SHOWN} episodes succeeded, {path}"


def make_attempt(data: Any, execute: int) -> Callable[[nn.Module, int], Trials]:
    """A function of a policy and a number of episodes, which lets the one act in the other."""
    world, tokens = data.world, data.tokens

    def attempt(model: nn.Module, number: int) -> Trials:
        assert isinstance(model, Policy)
        with evaluating(model) as device:

            def act(observations: Tensor) -> Tensor:
                return model.act(observations.to(device)).cpu()

            return run_trials(act, world, tokens, data.trial_beginnings(number), execute)

    return attempt


def refuse_unless_policy(model: nn.Module, data: Any) -> None:
    """Refuse a model that drives no robot, or one with other chunks.

    Raises:
        UserError: it is no Policy, or its sizes are not those of the data.
    """
    if not isinstance(model, Policy):
        raise UserError(
            f"task=imitation needs a policy, and {getattr(model, 'name', 'this model')} is none; use model=beast"
        )
    for field, size in Imitation.fields(data).items():
        own = vars(model.config)[field]
        if own != size:
            raise UserError(
                f"a policy must be made for its data, whose {field} is {size}; got model.{field}={own}: leave it out, "
                "or choose the data and the codec that the policy was trained with"
            )
