"""A text from the model, from time to time."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from zoo.train.callbacks.limits import update_done
from zoo.train.rng import get_rng_states, set_rng_states
from zoo.train.tasks.task import Task

__all__ = ["SampleText", "sample"]


def sample(
    generate: Callable[..., Iterator[int]],
    model: nn.Module,
    tokenizer: Any,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """A text that begins a document, the same for the same weights; training does not notice it.

    Args:
        generate: `zoo.decoding.generate`.
        model: the language model.
        tokenizer: gives the start symbol `eos_id`, which also ends the text, and `decode`.
        max_tokens: where to cut.
        temperature: flattens (> 1) or sharpens (< 1) the distribution.
        top_p: keep the most likely tokens that make up this much probability.
        seed: of the sampler.
    """
    states = get_rng_states()
    try:
        stream = generate(
            model,
            [tokenizer.eos_id],
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_ids=(tokenizer.eos_id,),
        )
        ids = [token for token in stream if token != tokenizer.eos_id and token < tokenizer.vocab_size]
    finally:
        set_rng_states(states)
    text: str = tokenizer.decode(ids)
    # An untrained model writes control characters, which a terminal would obey.
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class SampleText(Callback):
    """Shows a sample every `every` updates; the one at the end belongs to the run's report.

    Args:
        every: updates between two samples, 0 for none.
        draw: model -> text.
        show: called with the text.
    """

    def __init__(self, every: int, draw: Callable[[nn.Module], str], show: Callable[[str], None]) -> None:
        self.every = every
        self.draw = draw
        self.show = show

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw one when it is time: on every rank, since weights may be cut across them and none could go on alone."""
        step = trainer.global_step
        due = self.every and step % self.every == 0 and update_done(trainer, batch_idx) and not trainer.should_stop
        if due:
            assert isinstance(pl_module, Task)
            start = time.monotonic()
            self.show(f"sample at step {step}:\n{self.draw(pl_module.model)}")
            pl_module.pause(time.monotonic() - start)
