"""The step of decoding as one compiled program: no Python and little memory traffic between a model's operators."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.layers.kv_cache import AttentionSlots
from zoo.layers.state import map_state

Step = Callable[[SequenceModel, Tensor, Any], tuple[Tensor, Any]]


def step(model: SequenceModel, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Tokens (B, T) and the state before them -> the logits (B, vocab) behind the last, and the state after it."""
    hidden, state = model.encode(tokens, state)
    return model.head(hidden[:, -1:])[:, -1], state


class CompiledStep:
    """`step` through torch.compile, for any number of tokens that follow one another.

    The first call runs as it is, so that what grows in a state (an attention layer's cache) is known and one program
    serves every length; the second one compiles, which takes up to a minute and less when torch finds it in its cache.
    A program belongs to a model and a number of rows, and serves later instances.
    """

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, model: SequenceModel, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As `step`.

        Raises:
            UserError: torch cannot compile here.
        """
        _mark_slots(state)
        if not self._begun:
            self._begun = True
            logits, after = step(model, tokens, state)
            after = map_state(Tensor.contiguous, after)
            _mark_growing(state, after)
            return logits, after
        try:
            return _program()(model, tokens, state)
        except torch._dynamo.exc.TorchDynamoException as error:  # the backend's errors are of it
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"compile needs a compiler that torch can use (a C++ one on a CPU, Triton on a GPU), and it failed: "
                f"{reason.strip()}; install one, or leave compile out"
            ) from error


@functools.cache
def _program() -> Step:
    def run(model: SequenceModel, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = step(model, tokens, state)
        return logits, map_state(Tensor.contiguous, state)  # strides that vary would be compiled again

    compiled: Step = torch.compile(run)  # not at import: torch.compile loads the compiler
    return compiled


def _mark_growing(before: Any, after: Any) -> None:
    """Tell the compiler which dimensions of a state differ between two of its moments."""
    for old, new in zip(_leaves(before), _leaves(after), strict=True):
        for dim, (m, n) in enumerate(zip(old.shape, new.shape, strict=True)):
            if m != n:
                torch._dynamo.maybe_mark_dynamic(new, dim)


def _mark_slots(state: Any) -> None:
    """Tell the compiler that caches have any number of slots."""
    if isinstance(state, AttentionSlots):
        torch._dynamo.maybe_mark_dynamic(state.k, 1)
        torch._dynamo.maybe_mark_dynamic(state.v, 1)
    elif not isinstance(state, Tensor):
        for part in state:
            _mark_slots(part)


def _leaves(state: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_state(lambda x: tensors.append(x) or x, state)  # type: ignore[func-returns-value]
    return tensors
