"""Token by token: one step of the state per token, drawn from the model's distribution."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from zoo.codecs import Codec
from zoo.decoding.decoder import Decoder, Piece, Prompt, decode, register_decoder
from zoo.decoding.distribution import refuse_not_a_number, sample
from zoo.layers import SequenceModel

__all__ = ["Sampling", "sampling"]


@register_decoder("sampling")
@dataclass(frozen=True, kw_only=True)
class Sampling(Decoder):
    """One forward a token. With temperature 0 it is greedy decoding.

    compile: run all tokens but the first two through torch.compile, one program for all layers.
    """

    compile: bool = False

    def run(
        self, model: SequenceModel, prompt: Prompt, codec: Codec | None, generator: torch.Generator
    ) -> Iterator[Piece]:
        """Pieces of text, one forward a token."""
        session, logits = prompt.read(model, compile=self.compile)
        running = [True] * len(session.tokens)
        for n in range(self.max_tokens):
            refuse_not_a_number(logits)
            drawn = sample(logits, **self.distribution, generator=generator).tolist()
            tokens = [[token] if alive else [] for token, alive in zip(drawn, running, strict=True)]
            session.draw([row[0] if row else None for row in tokens])
            running = [bool(row) and row[0] not in prompt.stop_ids for row in tokens]
            yield Piece(tokens, [not alive for alive in running], {"forwards": 1})
            if not any(running):
                return
            if n + 1 < self.max_tokens:
                rows = [row if alive else [] for row, alive in zip(tokens, running, strict=True)]
                logits = session.extend(rows)[:, -1]


def sampling(
    model: SequenceModel,
    prompts: Sequence[Sequence[int]],
    config: Sampling | None = None,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[Piece]:
    """Continue prompts token by token; `generate_batch` gives the same tokens without the pieces around them."""
    return decode(config or Sampling(), model, Prompt(prompts, stop_ids=stop_ids))
