"""Sampling as plain functions: tokens as they are drawn."""

from collections.abc import Collection, Iterator, Sequence

from zoo.decoding.decoder import Prompt, decode
from zoo.decoding.decoders.sampling import Sampling
from zoo.layers import SequenceModel

__all__ = ["generate", "generate_batch"]


def generate_batch(
    model: SequenceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Continue several prompts together; yields one token a row and step, None for rows that have stopped.

    Prompts may differ in length, which changes nothing for any row. The stop token itself is yielded. Ends when every
    row has stopped or after `max_tokens` steps.

    Args:
        model: tokens (B, T) -> (logits, state), on one device; put in eval mode while this runs.
        prompts: token ids, at least one each.
        max_tokens: how many to add to each row at most.
        temperature, top_k, top_p: see `sample`.
        seed: of the sampling; None draws a fresh one.
        stop_ids: tokens that end a row.
        compile: run all tokens but the first two through torch.compile, one program for all layers: several times as
            fast where a layer is small, for up to a minute of compiling at the third token (torch keeps programs on
            disk; a later process needs seconds). Needs a C++ compiler on a CPU.

    Raises:
        ValueError: the model is not causal, no prompt, an empty prompt, a token outside the vocabulary, or a setting
            outside its range.
        UserError: compile=True where torch cannot compile, or scores that are not numbers: the weights are broken.
    """
    if max_tokens < 1:
        return
    decoder = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, compile=compile
    )
    for piece in decode(decoder, model, Prompt(prompts, stop_ids=stop_ids)):
        yield [row[0] if row else None for row in piece.tokens]


def generate(
    model: SequenceModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    compile: bool = False,
) -> Iterator[int]:
    """Continue one prompt, yielding every token as soon as it is drawn; see `generate_batch` for the arguments."""
    rows = generate_batch(
        model, [prompt], max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop_ids=stop_ids, compile=compile,
    )  # fmt: skip
    for (token,) in rows:
        assert token is not None
        yield token
