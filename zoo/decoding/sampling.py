"""Token by token: prefill the prompt once, then one step of the state per token, yielding each as it is drawn."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from zoo.decoding.causal import refuse_unless_causal
from zoo.decoding.compiled import CompiledStep, Step, step
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.layers.state import reserve


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
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0 (0 takes the most likely token); got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    ranked, tokens = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = float("-inf")
    probabilities = ranked.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


def _refuse_not_a_number(logits: Tensor) -> None:
    """Refuse scores from which nothing can be drawn; minus infinity is a token that cannot come."""
    if not bool((logits < float("inf")).all()):  # nor is NaN
        raise UserError(
            "the model's scores of the next token are not numbers, so its weights are broken or its training diverged; "
            "take an earlier checkpoint, or train again with a lower optim.lr"
        )


@torch.inference_mode()
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

    Prompts of different lengths are padded on the left and masked, which changes nothing for any row. The stop token
    itself is yielded. Ends when every row has stopped or after `max_tokens` steps.

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
        ValueError: the model is not causal, no prompt, an empty prompt, or a token outside the vocabulary.
        UserError: compile=True where torch cannot compile, or scores that are not numbers: the weights are broken.
    """
    refuse_unless_causal(model)
    vocab = model.config.vocab_size
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt must have at least one token; got an empty one")
    for token in {token for prompt in prompts for token in prompt}:
        if not 0 <= token < vocab:
            raise ValueError(f"tokens must be in [0, {vocab}), the model's vocabulary; got {token}")
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = True
    running = [True] * len(prompts)
    training = model.training
    model.eval()
    advance: Step = CompiledStep() if compile else step
    try:
        hidden, state = model.encode(tokens, mask=None if bool(mask.all()) else mask)
        logits = model.head(hidden[:, -1:])[:, -1]
        for n in range(max_tokens):
            _refuse_not_a_number(logits)
            drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            values = drawn.tolist()
            yield [value if alive else None for value, alive in zip(values, running, strict=True)]
            running = [alive and value not in stop_ids for value, alive in zip(values, running, strict=True)]
            if not any(running):
                return
            if n + 1 < max_tokens:
                state = reserve(model, state, longest + n + 1)
                logits, state = advance(model, drawn[:, None], state)
    finally:
        model.train(training)


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
