"""Speculative decoding: a drafter proposes several tokens, and one forward of the model decides on all of them."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zoo.codecs import Codec
from zoo.decoding.decoder import Decoder, Piece, Prompt, decode, register_decoder
from zoo.decoding.distribution import probabilities, refuse_not_a_number
from zoo.decoding.drafters import NGram
from zoo.decoding.session import Session
from zoo.errors import UsageError, UserError
from zoo.layers import SequenceModel
from zoo.layers.state import Prefixes, State
from zoo.ranges import Range

__all__ = ["Speculative", "speculative"]


@runtime_checkable
class TakesBack(Protocol):
    """A model with the way back to the state after any prefix of a window."""

    def look_ahead(self, tokens: Tensor, mask: Tensor, state: State) -> tuple[Tensor, Prefixes]:
        """Run a ragged window, and keep the states after every prefix of each row."""
        ...


@register_decoder("speculative")
@dataclass(frozen=True, kw_only=True)
class Speculative(Decoder):
    """Fewer forwards, the same text: with temperature 0 the tokens of greedy decoding, else the model's distribution.

    Every row has random numbers of its own, so that its text does not depend on its neighbours.

    drafter: "ngram" looks for the row's last tokens earlier in its own text, and proposes what followed.
    gamma: tokens that are proposed at most in one round.
    longest, shortest: tokens of a match of "ngram".

    Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. A draft is certain of itself (q = 1).
    """

    drafter: Literal["ngram"] = "ngram"
    gamma: Annotated[int, Range(1, 64)] = 4
    longest: Annotated[int, Range(1, 64)] = 6
    shortest: Annotated[int, Range(1, 64)] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest > self.longest:
            raise UsageError(f"decoder.shortest must be at most longest = {self.longest}, got {self.shortest}")

    def refuse(self, model: nn.Module) -> None:
        """Refuse a model that cannot be asked one token after the other, or has no way back to a prefix."""
        super().refuse(model)
        if not isinstance(model, TakesBack):
            raise UserError(
                f"decoder=speculative takes proposed tokens back, and {type(model).__name__} has no look_ahead; take "
                "decoder=sampling"
            )

    def run(
        self, model: SequenceModel, prompt: Prompt, codec: Codec | None, generator: torch.Generator
    ) -> Iterator[Piece]:
        """Pieces of text, each what one forward has confirmed of a draft, and one token more."""
        session, logits = prompt.read(model)
        rows = len(session.tokens)
        drafters = [NGram(self.longest, self.shortest) for _ in range(rows)]
        generators = [_generator_of(generator, row) for row in range(rows)]
        left, ended = [self.max_tokens] * rows, [False] * rows
        drafts: list[list[int]] = [[] for _ in range(rows)]
        spent, logits = 1, logits[:, None]
        while True:
            gained: list[list[int]] = []
            accepted = 0
            for row in range(rows):
                scores = logits[row, : len(drafts[row]) + 1]
                new = [] if ended[row] else self._verified(scores, drafts[row], generators[row])
                gained.append(_until_stop(new, prompt.stop_ids))
                accepted += min(len(gained[-1]), max(0, len(new) - 1))
            _keep(session, gained)
            left = [room - len(new) for room, new in zip(left, gained, strict=True)]
            ended = [
                done or not room or new[-1] in prompt.stop_ids
                for done, room, new in zip(ended, left, gained, strict=True)
            ]
            proposed = sum(map(len, drafts))
            yield Piece(gained, ended, {"forwards": spent, "proposed": proposed, "accepted": accepted})
            if all(ended):
                return
            drafts = [
                [] if ended[row] else drafters[row].draft(session.text(row), min(self.gamma, left[row] - 1))
                for row in range(rows)
            ]
            logits, spent = _look(session, gained, drafts, ended), 1

    def _verified(self, logits: Tensor, draft: Sequence[int], generator: torch.Generator) -> list[int]:
        """The tokens of a draft that stand, and one more; logits (len(draft) + 1, vocab)."""
        refuse_not_a_number(logits)
        if self.temperature == 0:
            best = logits.float().argmax(dim=-1).tolist()
            stand = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
            return best[: stand + 1]
        p = probabilities(logits, **self.distribution).double().cpu()
        for i, token in enumerate(draft):
            if not _uniform(generator) < accepts(p[i], token):
                return [*draft[:i], _draw(residual(p[i], token), generator)]
        return [*draft, _draw(p[-1], generator)]


def accepts(p: Tensor, token: int) -> float:
    """The probability with which a draft that is certain of a token is accepted: min(1, p / q) with q = 1."""
    return float(p[token])


def residual(p: Tensor, token: int) -> Tensor:
    """The distribution of the token that stands in for a rejected one: (p - q)_+, normalised."""
    rest = p.clone()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0 else p


def speculative(
    model: SequenceModel,
    prompts: Sequence[Sequence[int]],
    config: Speculative | None = None,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[Piece]:
    """Continue prompts in fewer forwards than tokens; `sum` over the pieces' `info` says how many.

    Args:
        model: causal.
        prompts: token ids, at least one each; lengths may differ.
        config: see `Speculative`.
        stop_ids: tokens that end a row; each is the last of its row.
    """
    return decode(config or Speculative(), model, Prompt(prompts, stop_ids=stop_ids))


def _look(session: Session, gained: list[list[int]], drafts: list[list[int]], ended: list[bool]) -> Tensor:
    """Run each row's newest token and its draft; without any draft there is nothing to take back."""
    windows = [[] if done else [new[-1], *draft] for new, draft, done in zip(gained, drafts, ended, strict=True)]
    return session.propose(windows) if any(drafts) else session.extend(windows)


def _keep(session: Session, gained: list[list[int]]) -> None:
    """Commit what each row gained but its last token, which no forward has read yet."""
    if session.proposing:
        session.commit([len(new) for new in gained])  # the window's first token is the newest of the last round
    session.draw([new[-1] if new else None for new in gained])


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def _generator_of(generator: torch.Generator, row: int) -> torch.Generator:
    """The random numbers of a row, whatever its neighbours are; the multiplier is Knuth's, of MMIX."""
    seed = (generator.initial_seed() + row) * 6364136223846793005 + 1442695040888963407
    return torch.Generator().manual_seed(seed % 2**63)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _draw(p: Tensor, generator: torch.Generator) -> int:
    """A token by its probability: where the sums of p pass a uniform number."""
    sums = p.cumsum(0)
    return int(torch.searchsorted(sums, _uniform(generator) * sums[-1], right=True).clamp(max=int(p.nonzero()[-1])))
