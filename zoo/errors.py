"""Errors that a user can cause: one sentence with the rule, the fact and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A refusal that the command line prints as one sentence, without a traceback (exit code 1)."""


class UsageError(UserError):
    """The words of a command are off: an unknown name, field or type (exit code 2)."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The clause "; did you mean 'x'?" when a known word is close to `word`, else an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def remedy(word: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a refusal: "; did you mean 'x'? otherwise" when a known word is close, else "; otherwise"."""
    hint = did_you_mean(word, known)
    return f"{hint} {otherwise}" if hint else f"; {otherwise}"
