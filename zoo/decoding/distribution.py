"""What the next token is drawn from: a distribution over the vocabulary, and the draw."""

import torch
from torch import Tensor

from zoo.errors import UserError

__all__ = ["probabilities", "refuse_not_a_number", "sample"]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), after cutting the tail of the distribution.

    Args:
        logits: (B, vocab).
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least p, in (0, 1].
        generator: source of randomness, on the device of the logits.

    Returns:
        (B,) int64.

    Raises:
        ValueError: temperature < 0, top_k < 1 or top_p outside (0, 1].
    """
    _check(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    ranked, tokens = _ranked(logits, temperature, top_k, top_p)
    drawn = torch.multinomial(ranked, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


def probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that `sample` draws from, (..., vocab) in the order of the vocabulary; arguments as of it.

    With temperature 0 the most likely token has probability 1. float64 for float64 logits, float32 for others.
    """
    _check(temperature, top_k, top_p)
    if temperature == 0:
        best = logits.float().argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ranked, tokens = _ranked(wide, temperature, top_k, top_p)
    spread = torch.zeros_like(ranked).scatter(-1, tokens, ranked)
    return spread / spread.sum(dim=-1, keepdim=True)


def refuse_not_a_number(logits: Tensor) -> None:
    """Refuse scores from which nothing can be drawn; minus infinity is a token that cannot come.

    Raises:
        UserError: there is a NaN or an infinity.
    """
    if not bool((logits < float("inf")).all()):  # nor is NaN
        raise UserError(
            "the model's scores of the next token are not numbers, so its weights are broken or its training diverged; "
            "take an earlier checkpoint, or train again with a lower optim.lr"
        )


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0 (0 takes the most likely token); got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")


def _ranked(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Probabilities from the most likely token on, not normalised after the cut of top_p, and the tokens."""
    ranked, tokens = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = float("-inf")
    kept = ranked.softmax(dim=-1)
    if top_p is not None:
        before = kept.cumsum(dim=-1) - kept
        kept = kept.masked_fill(before >= top_p, 0.0)
    return kept, tokens
