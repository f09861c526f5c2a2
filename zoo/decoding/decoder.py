"""What a decoder is: settings with ranges, what it asks of a model, and a generator of pieces."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zoo.codecs import Codec
from zoo.decoding.causal import refuse_unless_causal, refuse_unless_stepwise
from zoo.decoding.session import Session
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.ranges import Range, check_fields

__all__ = ["DECODERS", "Decoder", "Piece", "Prompt", "decode", "register_decoder", "why_not"]

Kind = TypeVar("Kind", bound="type[Decoder]")
DECODERS: dict[str, "type[Decoder]"] = {}


class Piece(NamedTuple):
    """What one moment of decoding gives.

    tokens: what each row gained, nothing for rows that have ended.
    ended: which rows have ended.
    info: numbers of this moment that are summed up: forwards, proposed, accepted.
    """

    tokens: list[list[int]]
    ended: list[bool]
    info: Mapping[str, float]


class Prompt:
    """What a decoder goes on from: token ids by row, and a session that has read text before them, or None.

    Args:
        rows: token ids; at least one each, none where a session's row has a token that was drawn and not run.
        stop_ids: tokens that end a row.
        session: to go on with. `read` makes one where there is none, and the caller may keep it afterwards.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], *, stop_ids: Collection[int] = (), session: Session | None = None
    ):
        self.rows, self.stop_ids, self.session = rows, frozenset(stop_ids), session

    def read(self, model: SequenceModel, *, compile: bool = False) -> tuple[Session, Tensor]:
        """A session that has read the rows, and the logits (B, vocab) behind them."""
        if self.session is None:
            self.session = Session(model, compile=compile)
            return self.session, self.session.begin(self.rows)
        newest = self.session.newest
        if len(newest) != len(self.rows):
            raise UserError(f"the state has {len(newest)} rows, and the prompt {len(self.rows)}; give one for each")
        windows = [[*([] if new is None else [new]), *row] for new, row in zip(newest, self.rows, strict=True)]
        if not all(windows):
            raise UserError("a prompt must have at least one token to go on from this state; add some text")
        logits = self.session.extend(windows)
        last = torch.tensor([len(window) - 1 for window in windows], device=logits.device)
        return self.session, logits[torch.arange(len(windows), device=logits.device), last]


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """A way to continue text. A subclass adds settings, and yields pieces in `run`.

    max_tokens: how many to add to each row at most.
    temperature, top_k, top_p: of the distribution of a token; see `zoo.decoding.sample`.
    seed: of all draws; None takes a fresh one.
    """

    max_tokens: Annotated[int, Range(1)] = 256
    temperature: Annotated[float, Range(0)] = 1.0
    top_k: Annotated[int | None, Range(1)] = None
    top_p: Annotated[float | None, Range(above=0, most=1)] = None
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None

    def __post_init__(self) -> None:
        check_fields(self)

    def refuse(self, model: nn.Module) -> None:
        """Refuse a model that cannot be decoded this way.

        Raises:
            UserError: the sentence says what the decoder asks for, what the model lacks, and what to do.
        """
        refuse_unless_causal(model)
        refuse_unless_stepwise(model)

    @abstractmethod
    def run(self, model: Any, prompt: Prompt, codec: Codec | None, generator: torch.Generator) -> Iterator[Piece]:
        """Continue the prompt, a piece at a time; the session is up to date whenever a piece is yielded.

        Args:
            model: in eval mode, and not refused.
            prompt: what to go on from.
            codec: what the tokens mean, or None.
            generator: source of randomness, on the model's device; the same seed gives the same pieces.
        """

    @property
    def distribution(self) -> dict[str, Any]:
        """The arguments of `sample` and `probabilities`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def register_decoder(name: str) -> Callable[[Kind], Kind]:
    """Give a decoder its name: a decorator on a frozen dataclass that inherits from `Decoder`.

    Raises:
        ValueError: the name belongs to another decoder.
    """

    def add(kind: Kind) -> Kind:
        if DECODERS.setdefault(name, kind) is not kind:
            raise ValueError(f"a decoder's name is used once; {name!r} is already {DECODERS[name]!r}, choose another")
        return kind

    return add


def why_not(kind: type[Decoder], model: nn.Module) -> str | None:
    """The sentence by which a decoder refuses a model; None for a model that it takes."""
    try:
        kind().refuse(model)
    except UserError as error:
        return str(error)
    return None


def decode(decoder: Decoder, model: SequenceModel, prompt: Prompt, codec: Codec | None = None) -> Iterator[Piece]:
    """Continue a prompt by a decoder; the model is in eval mode while this runs.

    Raises:
        UserError: the decoder refuses the model, or the model's scores are not numbers.
        ValueError: no prompt, an empty one, or a token outside the vocabulary.
    """
    decoder.refuse(model)
    generator = torch.Generator(next(model.parameters()).device)
    if decoder.seed is None:
        generator.seed()
    else:
        generator.manual_seed(decoder.seed)
    training = model.training
    model.eval()
    try:
        yield from decoder.run(model, prompt, codec, generator)
    finally:
        model.train(training)
