"""Text that streams from the Hugging Face hub."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np

from zoo import tokenizers
from zoo.errors import UserError, did_you_mean
from zoo.train.data.core.base import LoaderSettings, at_least
from zoo.train.data.core.corpus import Corpus, CutSource, PackedSource, Packing, validation_source
from zoo.train.data.core.loader import Batch, Source
from zoo.train.data.text.base import BATCH_SIZE, SEQ_LEN, TextSettings


class Hub(TextSettings):
    """A data set of the hub, read as it streams, in its own order, from its start again when it ends.

    The first documents are held out for validation, and the stream for training starts behind them. Copies of them in
    the rest of the stream are not looked for. Every rank reads the whole stream and keeps its own batches. After a
    restart the stream is read again up to where training was.

    Args:
        name: the data set, "owner/name"; a local folder of data files works too.
        subset: its configuration, where it has several.
        split: the split to read.
        field: the column that holds the text.
        val_documents: documents held out.
        steps_per_epoch: batches until the next validation; a stream has no end that could say.
        seq_len: tokens per sequence.
        batch_size: sequences per step and rank.
        tokenizer: "bytes", "sentencepiece" (trained on the first documents behind the held-out ones), or a folder.
        vocab_size: size of the SentencePiece model; 1024 when omitted.
        packing: "cut" or "packed", as for files.
        seed: the run's seed; nothing here depends on it.
    """

    SAMPLE = 2_000  # documents that a SentencePiece model learns from

    def __init__(
        self,
        *,
        name: str,
        subset: str | None = None,
        split: str = "train",
        field: str = "text",
        val_documents: int = 100,
        steps_per_epoch: int = 1_000,
        seq_len: int = SEQ_LEN,
        batch_size: int = BATCH_SIZE,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        packing: Packing = "cut",
        seed: int = 0,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=0, seed=seed),
            seq_len=seq_len,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            packing=packing,
        )
        if not name:
            raise UserError("data.name must name a data set; it is empty: set data.name=owner/name")
        at_least("val_documents", val_documents, 1)
        at_least("steps_per_epoch", steps_per_epoch, 1)
        self.name, self.subset, self.split, self.field = name, subset, split, field
        self.val_documents, self._steps_per_epoch = val_documents, steps_per_epoch
        self._tokenizer: tokenizers.Tokenizer | None = None

    @property
    def vocab_size(self) -> int:
        """The number of different tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:  # type: ignore[override]
        """The tokenizer of this text, made on first use."""
        if self._tokenizer is None:
            self._tokenizer = self.make_tokenizer(islice(self.texts(self.val_documents), self.SAMPLE))
        return self._tokenizer

    def texts(self, skip: int = 0) -> Iterator[str]:
        """The documents from a number on, once through."""
        try:
            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
            for row in rows.skip(skip):
                yield self._text(row)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # network, hub, file and format errors have no common base
            raise UserError(
                f"data=hub must be able to read its data set; {self.name!r} cannot be reached or read "
                f"({type(error).__name__}: {_first_line(error)}): check name and network, or use local files by "
                "data=text_files data.path=FOLDER"
            ) from error

    def _text(self, row: dict[str, Any]) -> str:
        if self.field not in row:
            raise UserError(
                f"every row must have the field {self.field!r}; {self.name!r} has {', '.join(row)}"
                f"{did_you_mean(self.field, row)}: name it by data.field"
            )
        return row[self.field] or ""

    def make_sources(self) -> tuple[Source, Source]:
        """The stream, and the held-out documents."""
        held = list(islice(self.texts(), self.val_documents))
        corpus, lengths = Corpus.of(held, self.tokenizer), self.tokenizer.byte_lengths()
        held_out = validation_source(self.packing, corpus, lengths, seq_len=self.seq_len, batch_size=self.batch_size)
        return _Stream(self, lengths), held_out

    def batches(self, corpus: Corpus, lengths: np.ndarray) -> CutSource | PackedSource:
        """A finished corpus as batches, in its own order."""
        kind = CutSource if self.packing == "cut" else PackedSource
        return kind(corpus, lengths, seq_len=self.seq_len, batch_size=self.batch_size, seed=None)


class _Stream:
    """Batches out of a stream: forward only, so a step behind the current one opens it anew.

    One step is a stretch of batch_size * seq_len * world tokens, shared out as a corpus of its own.
    """

    def __init__(self, data: Hub, lengths: np.ndarray):
        self.data, self.lengths = data, lengths
        self._stretches: Iterator[Corpus] = iter(())
        self._next: int | None = None  # number of the stretch that comes next

    def steps(self, world: int) -> int:
        return self.data._steps_per_epoch

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        number = epoch * self.data._steps_per_epoch + step
        if self._next is None or number < self._next:
            self._next, self._stretches = 0, self._cut(self.data.batch_size * self.data.seq_len * world)
        stretch = next(islice(self._stretches, number - self._next, None))
        self._next = number + 1
        return self.data.batches(stretch, self.lengths).batch(0, 0, rank, world)

    def _cut(self, size: int) -> Iterator[Corpus]:
        """Stretches of size + 1 tokens, each starting with the last token of the one before."""
        end = self.data.tokenizer.eos_id
        tokens, borders, extra = (
            np.array([end]),
            [0],
            [0],
        )  # what no stretch has had yet; extra[i] belongs to borders[i]
        while True:
            read = 0
            for text in self.data.texts(self.data.val_documents):
                if not text:
                    continue
                read += 1
                ids = self.data.tokenizer.encode_array(text)
                tokens = np.concatenate([tokens, ids, [end]])
                borders.append(len(tokens) - 1)
                extra.append(len(text.encode()) - int(self.lengths[ids].sum()))
                while len(tokens) > size:
                    inside = [i for i in range(1, len(borders)) if borders[i] <= size]
                    starts, more = [0, *(borders[i] for i in inside)], [extra[i] for i in inside]
                    if starts[-1] < size:  # the last document goes on in the next stretch
                        starts, more = [*starts, size], [*more, 0]
                    yield Corpus(tokens[: size + 1], np.array(starts), np.array(more))
                    tokens = tokens[size:]
                    kept = [i for i in range(1, len(borders)) if borders[i] > size]
                    borders, extra = [0, *(borders[i] - size for i in kept)], [0, *(extra[i] for i in kept)]
            if not read:
                raise UserError(
                    f"data=hub needs documents to train on; {self.data.name!r} has none behind the "
                    f"{self.data.val_documents} held out: lower data.val_documents or choose another split"
                )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
