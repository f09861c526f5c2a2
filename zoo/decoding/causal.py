"""What a text can be continued by."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from zoo.errors import UserError

__all__ = ["Continues", "refuse_unless_causal", "refuse_unless_stepwise"]


@runtime_checkable
class Continues(Protocol):
    """A model that reads tokens and goes on from a state; `zoo.layers.SequenceModel` is one."""

    def encode(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Tokens (B, T) and the state before them -> hidden vectors (B, T, D) and the state after them."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, vocab_size)."""
        ...


def refuse_unless_stepwise(model: nn.Module) -> None:
    """Refuse a model that cannot be asked for one token after the other.

    Raises:
        UserError: it lacks a method of `Continues`.
    """
    if not isinstance(model, Continues):
        lacks = [name for name in ("encode", "head") if not hasattr(model, name)]
        raise UserError(
            f"a text is continued token by token from a state, and {type(model).__name__} has no {' or '.join(lacks)}; "
            "zoo.layers.SequenceModel has both"
        )


def refuse_unless_causal(model: nn.Module) -> None:
    """Refuse a model that sees both sides of every token: it cannot be asked what comes next.

    Raises:
        UserError: `causal` of the model is False.
    """
    if not getattr(model, "causal", True):
        raise UserError(
            f"a text is continued by a causal model, and {getattr(model, 'name', 'this one')} sees both sides of every "
            "token; zoo eval measures it"
        )
