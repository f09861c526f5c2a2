"""What a form's gradients cannot do is refused: second derivatives, and derivatives in forward mode.

The fast forms write their backward out. torch would take what it returns for constants where the upstream gradient is
one (`loss.sum()`), and drop the second derivatives without a word; and a custom operator drops the tangents of forward
mode (`torch.func.jvp`, dual numbers). The reference forms are plain torch and have all of them.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "use backend='reference', a plain loop in torch, which has them"
ON_ONE_RANK = "differentiate twice on one rank, with backend='reference'"
_FORWARD_MODE: ContextVar[str | None] = ContextVar("zoo_forward_mode", default=None)  # the operator that tangents enter


def first_order(operator: str, remedy: str = REFERENCE) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark the backward of an autograd function or a custom operator: create_graph=True is refused there.

    Args:
        operator: the name that starts the sentence.
        remedy: what to do instead.
    """

    def mark(backward: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(backward)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            # gradients are on in a backward pass with create_graph=True, and while torch.compile reads one
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{operator}: has no second derivatives, and create_graph=True asks for them; {remedy}"
                )
            return backward(*args, **kwargs)

        return run

    return mark


def drops_tangents(launch: Callable[P, R]) -> Callable[P, R]:
    """Mark the body of a custom operator: inside an operator that tangents entered it is refused."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        entered = _FORWARD_MODE.get()
        if entered is not None:
            _refuse_tangents(entered, None)
        return launch(*args, **kwargs)

    return run


def in_forward_mode() -> bool:
    """Whether a level of dual numbers is open; asked before every call of an operator."""
    return forward_ad._current_level >= 0


def with_tangents(operator: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a public operator in forward mode.

    Raises:
        NotImplementedError: an argument has a tangent, and the form that runs would drop it.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if all(forward_ad.unpack_dual(x).tangent is None for x in tensors):
        return operator(*args, **kwargs)
    name = operator.__name__.removeprefix("_")
    token = _FORWARD_MODE.set(name)
    try:
        return operator(*args, **kwargs)
    except NotImplementedError as error:  # an autograd function without a rule, under dual numbers
        _refuse_tangents(name, error)
    except RuntimeError as error:
        if "setup_context" not in str(error):  # the same under torch.func
            raise
        _refuse_tangents(name, error)
    finally:
        _FORWARD_MODE.reset(token)


def _refuse_tangents(operator: str, cause: Exception | None) -> NoReturn:
    raise NotImplementedError(
        f"{operator}: has no derivatives in forward mode, and an argument carries a tangent; {REFERENCE}"
    ) from cause
