"""What a text can be continued by."""

from torch import nn

from zoo.errors import UserError

__all__ = ["refuse_unless_causal"]


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
