"""Decoding by block diffusion: the cache changes no token, rows are apart, and the rules take what they say."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.decoding.block_cache import BlockCache
from zoo.decoding.decoder import Prompt, decode
from zoo.decoding.decoders.block_diffusion import BlockDiffusion
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.ops import Visible

MASK = 49


def make(name: str = "sdar", **fields: Any) -> SequenceModel:
    torch.manual_seed(0)
    small = {"d_model": 32, "n_layers": 2, "n_heads": 2, "hidden_size": 32, "vocab_size": 50, "init_std": 0.3}
    model = zoo.create_model(name, **(small | fields)).double().eval()
    assert isinstance(model, SequenceModel)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(49, (n,), generator=generator).tolist() for n in (1, 3, 4, 9, 14)]


def run(model: SequenceModel, rows: list[list[int]], stop: Any = (), **settings: Any) -> tuple[list[list[int]], float]:
    """What every row gained, and how many forwards that took."""
    texts: list[list[int]] = [[] for _ in rows]
    forwards = 0.0
    for piece in decode(BlockDiffusion(**settings), model, Prompt(rows, stop_ids=stop)):
        for text, new in zip(texts, piece.tokens, strict=True):
            text.extend(new)
        forwards += piece.info["forwards"]
    return texts, forwards


@torch.no_grad()
def uncached(model: SequenceModel, prompt: list[int], tokens: int, size: int, rule: Any) -> list[int]:
    """The same text without any cache: all of it again in each step, by a mask of blocks over one stream."""
    text = list(prompt)
    while len(text) < len(prompt) + tokens:
        text += [MASK] * (size - len(text) % size)
        while MASK in text:
            at = torch.arange(len(text))[None] // size
            visible = Visible(at, at, torch.full_like(at, len(text)))
            logits = model.head(model.hidden(torch.tensor([text]), visible=visible))[0]
            logits[:, MASK] = -torch.inf
            masks = [i for i, token in enumerate(text) if token == MASK]
            best = logits.argmax(-1)
            for i in rule(masks, logits.float().softmax(-1)):
                text[i] = int(best[i])
    return text[len(prompt) : len(prompt) + tokens]


def surest(masks: list[int], p: Tensor) -> list[int]:
    return [max(masks, key=lambda i: float(p[i].max()))]


def over(threshold: float) -> Any:
    return lambda masks, p: [i for i in masks if float(p[i].max()) > threshold] or surest(masks, p)


def within(budget: float) -> Any:
    def rule(masks: list[int], p: Tensor) -> list[int]:
        entropies = {i: -float((p[i] * p[i].clamp(min=1e-30).log()).sum()) for i in masks}
        order, taken, total = sorted(masks, key=entropies.__getitem__), [], 0.0
        for i in order:
            total += entropies[i]
            if total > budget and taken:
                break
            taken.append(i)
            if total > budget:
                break
        return taken

    return rule


RULES = {
    "static": (surest, {"unmask": "static"}),
    "sequential": (lambda masks, p: masks[:1], {"unmask": "sequential"}),
    "dynamic": (over(0.3), {"unmask": "dynamic", "threshold": 0.3}),
    "entropy": (within(5.0), {"unmask": "entropy", "entropy": 5.0}),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_a_cached_batch_is_each_row_without_a_cache(name: str, size: int) -> None:
    model, (rule, settings) = make(), RULES[name]
    texts, forwards = run(model, prompts(), block_size=size, max_tokens=11, temperature=0.0, **settings)
    assert texts == [uncached(model, row, 11, size, rule) for row in prompts()]
    if name in ("dynamic", "entropy") and size > 1:
        assert forwards < run(model, prompts(), block_size=size, max_tokens=11, temperature=0.0, unmask="static")[1]


def test_blocks_cost_their_steps_and_one_forward_to_keep_them() -> None:
    model, row = make(), [[1, 2, 3, 4]]
    greedy = {"max_tokens": 12, "temperature": 0.0, "block_size": 4}
    assert run(model, row, unmask="static", **greedy)[1] == 1 + 3 * 4 + 2  # the last block is not kept
    assert run(model, row, unmask="static", steps=2, **greedy)[1] == 1 + 3 * 2 + 2
    assert run(model, row, unmask="static", steps=3, **greedy)[1] == 1 + 3 * 3 + 2
    assert run(model, row, unmask="dynamic", threshold=0.0, **greedy)[1] == 1 + 3 + 2
    assert run(model, row, unmask="dynamic", threshold=1.0, **greedy) == run(model, row, unmask="static", **greedy)


def test_a_row_ends_at_its_stop_token_and_no_mask_is_ever_written() -> None:
    model = make()
    (text,), _ = run(model, [[1, 2, 3]], max_tokens=20, temperature=0.0)
    stop = text[7]
    first = text.index(stop)
    (ended, other), _ = run(model, [[1, 2, 3], [5]], {stop}, max_tokens=20, temperature=0.0)
    assert ended == text[: first + 1]
    assert stop not in other[:-1]
    drawn, _ = run(model, prompts(), max_tokens=30, temperature=3.0, seed=1)
    assert all(len(row) == 30 and MASK not in row for row in drawn)
    assert drawn == run(model, prompts(), max_tokens=30, temperature=3.0, seed=1)[0]
    assert drawn != run(model, prompts(), max_tokens=30, temperature=3.0, seed=2)[0]


def test_confidence_is_that_before_the_cut() -> None:
    rows, greedy = prompts(), {"max_tokens": 12, "block_size": 4, "threshold": 0.999, "unmask": "dynamic"}
    assert run(make(), rows, top_k=1, **greedy)[1] == run(make(), rows, temperature=0.0, **greedy)[1]


def test_what_a_look_ran_leaves_no_trace() -> None:
    model = make()
    hidden = []
    for looks in (0, 3):
        cache = BlockCache(model, 2, 4)
        cache.look([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4]])
        cache.write([8, 4])
        for _ in range(looks):
            cache.look([[MASK] * 4, [MASK] * 4])
            cache.write([0, 0])
        hidden.append(cache.look([[9, 9, MASK, 9], [7, MASK, 7, 7]]))
    assert torch.equal(*hidden)


def test_models_that_cannot_are_refused() -> None:
    with pytest.raises(UserError, match="attention over the whole past in every layer, and Mamba is none"):
        run(zoo.create_model("mamba", "tiny", n_layers=1), [[1]])
    with pytest.raises(UserError, match="every layer, and Attention is none"):
        run(make("transformer", window=3), [[1]])
    with pytest.raises(UserError, match=r"decoder\.mask_id must be below the model's vocabulary of 50; got 50"):
        run(make(), [[1]], mask_id=50)
    with pytest.raises(ValueError, match="at least one token"):
        run(make(), [[]])
    assert len(run(make("transformer"), [[1]], max_tokens=3)[0][0]) == 3
