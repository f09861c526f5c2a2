"""A text from a language model."""

from typing import Any, cast

from torch import nn

from zoo.decoding import generate
from zoo.layers import SequenceModel

__all__ = ["sample_text"]


def sample_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """A text that begins a document, the same for the same weights.

    Args:
        model: the language model.
        tokenizer: gives the start symbol `eos_id`, which also ends the text, and `decode`.
        max_tokens: where to cut.
        temperature: flattens (> 1) or sharpens (< 1) the distribution.
        top_p: keep the most likely tokens that make up this much probability.
        seed: of the sampler.
    """
    stream = generate(
        cast(SequenceModel, model),
        [tokenizer.eos_id],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=(tokenizer.eos_id,),
    )
    ids = [token for token in stream if token != tokenizer.eos_id and token < tokenizer.vocab_size]
    text: str = tokenizer.decode(ids)
    # An untrained model writes control characters, which a terminal would obey.
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
