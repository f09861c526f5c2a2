"""Documents that are kept whole, whatever their lengths: the data of balanced strategies, and of any other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo import tokenizers
from zoo.errors import UserError
from zoo.train.balance.sampler import BalancedBatchSampler, Planner
from zoo.train.balance.whole_documents import Dealt
from zoo.train.contracts import CutsTime, MakesPlans
from zoo.train.data.core.base import DataModule, Metric, at_least
from zoo.train.data.core.loader import Loader, Source
from zoo.train.data.core.planned import AtMost, Documents, FromCorpus, InMemory, Plans, Rows
from zoo.train.data.text.base import BATCH_SIZE, SEQ_LEN, VAL_FRACTION, TextData
from zoo.train.data.text.pydocs import PyDocs
from zoo.train.data.text.text_files import TextFiles

__all__ = ["TextDocuments", "TokenDocuments"]

GLOBAL_TOKENS = 4 * BATCH_SIZE * SEQ_LEN  # a few documents of the text that Python carries


class PlannedDocuments(DataModule):
    """Batches of whole documents, about `global_tokens` tokens each; every document once an epoch, in random order.

    Under a strategy that plans (it has `planner_of`) a batch is a rank's part of a plan, else a packed row of the whole
    documents that fall to the rank; the documents of a batch are the same, whatever the strategy and the ranks.
    A document longer than `max_length` goes on as another one, without the memory of the first. Held-out documents
    are planned likewise, and each of their targets is scored once.

    Args:
        global_tokens: tokens of a batch, on all ranks together; a longer document makes a batch alone.
        max_length: inputs of a document; None keeps all whole.
        num_workers: processes that plan and prepare batches ahead.
        seed: the run's seed: the order of documents.
    """

    def __init__(self, *, global_tokens: int, max_length: int | None, num_workers: int, seed: int):
        super().__init__(batch_size=1, num_workers=num_workers, seed=seed)
        at_least("global_tokens", global_tokens, 1)
        if max_length is not None:
            at_least("max_length", max_length, 1)
        self.global_tokens, self.max_length = global_tokens, max_length
        self._whole: tuple[Documents, Documents] | None = None

    def make_documents(self) -> tuple[Documents, Documents]:
        """The documents of training and of validation, in this order."""
        raise NotImplementedError

    @property
    def documents(self) -> tuple[Documents, Documents]:
        """Training and validation, none longer than `max_length`; made on first use."""
        if self._whole is None:
            train, val = self.make_documents()
            for name, part in (("training", train), ("validation", val)):
                if not len(part.lengths):
                    raise UserError(f"the {name} part must hold a document; got none: give more documents")
            most = self.max_length
            self._whole = (train, val) if most is None else (AtMost(train, most), AtMost(val, most))
        return self._whole

    def make_sources(self) -> tuple[Source, Source]:
        """Rows, for whoever asks before a strategy is known."""
        train, val = (Rows(part, self._sampler(part, Dealt(1))) for part in self.documents)
        return train, val

    def train_dataloader(self) -> Loader:
        """Training batches from the restored position on, else from the beginning."""
        source, rank, world = self._placed(self.documents[0])
        return self._training_loader(source, rank, world, source.sampler.batches)

    def val_dataloader(self) -> Loader:
        """All held-out documents, in one order."""
        source, rank, world = self._placed(self.documents[1])
        return self._validation_loader(source, rank, world)

    def state_dict(self) -> dict[str, Any]:
        """The position, and a hash of what the order of documents depends on."""
        return {**super().state_dict(), "documents": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next `train_dataloader()` start at a saved position, under any strategy.

        Raises:
            UserError: it was saved with other documents or settings.
        """
        if state_dict["documents"] != self._order():
            raise UserError(
                "the position of a run belongs to its documents, data.global_tokens, data.max_length and seed, and one "
                "of them is another; documents would be dropped or repeated: give what the run began with"
            )
        super().load_state_dict(state_dict)

    def _order(self) -> str:
        return self._sampler(self.documents[0], Dealt(1)).settings()

    def _placed(self, documents: Documents) -> tuple[Plans | Rows, int, int]:
        """The source of these documents under the trainer's strategy, and this process's (rank, world) in it."""
        strategy: Any = None if self.trainer is None else self.trainer.strategy
        if isinstance(strategy, MakesPlans):
            planner = strategy.planner_of(int(documents.lengths.max()), self.global_tokens)
            return Plans(documents, self._sampler(documents, planner)), strategy.global_rank, strategy.world_size
        layout = strategy.layout if isinstance(strategy, CutsTime) else "contiguous"
        if layout != "contiguous":
            raise UserError(
                f"whole documents make rows of any length, and a {layout} layout cuts only some; use "
                "strategy=balanced, or a contiguous method such as lightseq"
            )
        return Rows(documents, self._sampler(documents, Dealt(1))), *self._shard()

    def _sampler(self, documents: Documents, planner: Planner) -> BalancedBatchSampler:
        try:
            return BalancedBatchSampler(documents.lengths, planner, self.global_tokens, self.seed)
        except ValueError as error:
            raise UserError(f"{error}; strategy.capacity is the room of a rank, data.max_length splits") from error


class TokenDocuments(PlannedDocuments):
    """Documents that you have as tokens.

    Args:
        train, val: 1-D tensors of at least two tokens; a token's target is the one after it.
        vocab_size: number of different tokens.
        metrics: what the task is judged by, of "perplexity", "accuracy" and "last_accuracy".

    The other settings are those of `PlannedDocuments`.
    """

    def __init__(
        self,
        train: Sequence[Tensor],
        val: Sequence[Tensor],
        *,
        vocab_size: int,
        global_tokens: int = GLOBAL_TOKENS,
        max_length: int | None = None,
        metrics: tuple[Metric, ...] = ("perplexity",),
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(global_tokens=global_tokens, max_length=max_length, num_workers=num_workers, seed=seed)
        self._given, self._vocab_size, self.metrics = (train, val), vocab_size, metrics

    @property
    def vocab_size(self) -> int:
        """The number of different tokens that the caller said."""
        return self._vocab_size

    def make_documents(self) -> tuple[Documents, Documents]:
        """The caller's tensors of training and of validation, as documents."""
        train, val = self._given
        return InMemory(train), InMemory(val)


class TextDocuments(PlannedDocuments):
    """The documents of text files, or of the text that every Python carries.

    Args:
        path: as `TextFiles` takes it; the topics of `PyDocs` when omitted.
        field, separator: of `TextFiles`.
        tokenizer, vocab_size, val_fraction: of all text, see `TextData`.
        global_tokens, max_length, num_workers, seed: of `PlannedDocuments`.
    """

    metrics: tuple[Metric, ...] = ("bits_per_byte", "perplexity")

    def __init__(
        self,
        *,
        path: str | None = None,
        field: str = "text",
        separator: str | None = None,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        global_tokens: int = GLOBAL_TOKENS,
        max_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = VAL_FRACTION,
    ):
        super().__init__(global_tokens=global_tokens, max_length=max_length, num_workers=num_workers, seed=seed)
        if path is None and (field != "text" or separator is not None):
            raise UserError("data.field and data.separator say how files are read; got no data.path: set it")
        self.text: TextData = (
            PyDocs(tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction)
            if path is None
            else TextFiles(
                path=path,
                field=field,
                separator=separator,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                val_fraction=val_fraction,
            )
        )

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:  # type: ignore[override]
        """The tokenizer of this text, made on first use."""
        return self.text.tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of different tokens of the text's tokenizer."""
        return self.text.vocab_size

    def make_documents(self) -> tuple[Documents, Documents]:
        """Tokenise, or take the tokens from the cache."""
        lengths = self.tokenizer.byte_lengths()
        train, val = (FromCorpus(corpus, lengths) for corpus in self.text.corpora())
        return train, val
