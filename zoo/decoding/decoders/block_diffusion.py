"""Block diffusion: a block begins as masks, and every forward unmasks the tokens that the model is sure of."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from zoo.codecs import Codec
from zoo.decoding.block_cache import BlockCache
from zoo.decoding.decoder import Decoder, Piece, Prompt, decode, register_decoder
from zoo.decoding.distribution import refuse_not_a_number, sample
from zoo.errors import UserError
from zoo.layers import Attention, SequenceModel
from zoo.layers.block_diffusion import block_size_of, mask_token_of
from zoo.ranges import Range

__all__ = ["BlockDiffusion", "block_diffusion"]


@register_decoder("block_diffusion")
@dataclass(frozen=True, kw_only=True)
class BlockDiffusion(Decoder):
    """Several tokens a forward, for models that were trained by task=block_diffusion.

    Rows are in blocks of their own. A block without masks costs one forward more, which writes its keys and values.
    Confidence is that of softmax(logits / temperature) before top_k and top_p, and of softmax(logits) when temperature
    is 0: otherwise a cut to one token would be sure of everything.

    block_size: tokens of a block; None takes the model's own, or 4.
    mask_id: the token that hides another; None takes the model's own, or the last of its vocabulary.
    unmask: "sequential" and "static" unmask block_size / steps masks a forward, the leftmost or the surest. "dynamic"
        takes all that are surer than `threshold` where these are more. "entropy" takes the masks of least entropy
        whose entropies sum up to `entropy` at most, one at least.
    steps: forwards in which a block is unmasked at most; None for one a token. Not for "entropy".
    threshold: a probability.
    entropy: in nats.

    Source: SDAR, arXiv 2510.06303; the entropy rule is JetEngine's.
    """

    block_size: Annotated[int | None, Range(1)] = None
    mask_id: Annotated[int | None, Range(0)] = None
    unmask: Literal["sequential", "static", "dynamic", "entropy"] = "dynamic"
    steps: Annotated[int | None, Range(1)] = None
    threshold: Annotated[float, Range(0)] = 0.9
    entropy: Annotated[float, Range(0)] = 0.35

    def refuse(self, model: nn.Module) -> None:
        """Refuse a model with a layer that is no attention over the whole past, or without room for the mask."""
        super().refuse(model)
        if not isinstance(model, SequenceModel):
            raise UserError(
                f"decoder=block_diffusion continues a text, and {type(model).__name__} has no blocks of one"
            )
        for mixer in model.blocks.mixers():
            if not isinstance(mixer, Attention) or mixer.window is not None:
                raise UserError(
                    "decoder=block_diffusion needs attention over the whole past in every layer, and "
                    f"{type(mixer).__name__} is none; take decoder=sampling"
                )
        if self.mask_id is not None and self.mask_id >= model.config.vocab_size:
            raise UserError(
                f"decoder.mask_id must be below the model's vocabulary of {model.config.vocab_size}; got {self.mask_id}"
            )

    def run(
        self, model: SequenceModel, prompt: Prompt, codec: Codec | None, generator: torch.Generator
    ) -> Iterator[Piece]:
        """Pieces of text, each what one forward has finished: whole blocks, or nothing."""
        if prompt.session is not None:
            raise UserError("decoder=block_diffusion cannot go on from a saved state; give the text as a prompt")
        size = block_size_of(model.config) if self.block_size is None else self.block_size
        mask = mask_token_of(model.config) if self.mask_id is None else self.mask_id
        rows = [_checked(row, model.config.vocab_size) for row in prompt.rows]
        if not rows:
            raise ValueError("a prompt must have at least one token; got an empty one")
        cache = BlockCache(model, len(rows), size)
        whole = [len(row) // size * size for row in rows]
        if any(whole):
            cache.look([row[:n] for row, n in zip(rows, whole, strict=True)])
            cache.write(whole)
        given = [len(row) - n for row, n in zip(rows, whole, strict=True)]
        work = [row[n:] + [mask] * (size - len(row) + n) for row, n in zip(rows, whole, strict=True)]
        left, steps, spent = [self.max_tokens] * len(rows), [0] * len(rows), 1 + int(any(whole))
        while True:
            logits = cache.logits([block if room else [] for block, room in zip(work, left, strict=True)])
            logits = logits.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)
            full = [mask not in block for block in work]
            gained: list[list[int]] = [[] for _ in rows]
            for row, block in enumerate(work):
                if not left[row] or full[row]:
                    continue
                work[row] = self._unmasked(block, logits[row], mask, steps[row], generator)
                steps[row] += 1
                if mask not in work[row]:
                    gained[row] = _until_stop(work[row][given[row] :][: left[row]], prompt.stop_ids)
            cache.write([size if full[row] and left[row] else 0 for row in range(len(rows))])
            for row, new in enumerate(gained):
                ended = bool(new) and new[-1] in prompt.stop_ids
                left[row] = 0 if ended else left[row] - len(new)
                if full[row] and left[row]:
                    work[row], given[row], steps[row] = [mask] * size, 0, 0
            yield Piece(gained, [not room for room in left], {"forwards": spent})
            spent = 1
            if not any(left):
                return

    def _unmasked(
        self, block: list[int], logits: Tensor, mask: int, step: int, generator: torch.Generator
    ) -> list[int]:
        """A block after one step; logits (block size, vocab)."""
        at = [i for i, token in enumerate(block) if token == mask]
        logits = logits[at].float()
        refuse_not_a_number(logits)
        drawn = sample(logits, **self.distribution, generator=generator)
        p = (logits / self.temperature if self.temperature > 0 else logits).softmax(-1)
        confidence = p.gather(1, drawn[:, None])[:, 0]
        chosen = self._chosen(p, confidence, len(block), step)
        after, tokens = list(block), drawn.tolist()
        for i in chosen.tolist():
            after[at[i]] = tokens[i]
        return after

    def _chosen(self, p: Tensor, confidence: Tensor, size: int, step: int) -> Tensor:
        """Which of the masks are unmasked; p (masks, vocab)."""
        if self.unmask == "entropy":
            entropies, order = torch.special.entr(p).sum(-1).sort(stable=True)
            surest: Tensor = order[: max(1, int((entropies.cumsum(0) <= self.entropy).sum()))]
            return surest
        steps = min(self.steps or size, size)
        n = min(size // steps + int(step < size % steps), len(p))
        if self.unmask == "sequential":
            return torch.arange(n)
        order = confidence.sort(descending=True, stable=True).indices
        if self.unmask == "dynamic":
            n = max(n, int((confidence > self.threshold).sum()))
        return order[:n]


def block_diffusion(
    model: SequenceModel,
    prompts: Sequence[Sequence[int]],
    config: BlockDiffusion | None = None,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[Piece]:
    """Continue prompts block by block; `sum` over the pieces' `info` says in how many forwards.

    Args:
        model: trained by task=block_diffusion.
        prompts: token ids, at least one each; lengths may differ.
        config: see `BlockDiffusion`.
        stop_ids: tokens that end a row; each is the last of its row.
    """
    return decode(config or BlockDiffusion(), model, Prompt(prompts, stop_ids=stop_ids))


def _checked(prompt: Sequence[int], vocab: int) -> list[int]:
    row = list(prompt)
    if not row:
        raise ValueError("a prompt must have at least one token; got an empty one")
    for token in row:
        if not 0 <= token < vocab:
            raise ValueError(f"tokens must be in [0, {vocab}), the model's vocabulary; got {token}")
    return row


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
