"""Documents as one flat array of tokens, and the two ways to make batches of it.

The array is [end] document [end] document [end]: one symbol between documents, the end of one and the start of the
next. The target of every token is the token after it, so the inputs of a document start with the symbol and its last
target is the symbol, in both ways of packing; they differ in what a row is and in whether documents see each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from zoo.tokenizers import Tokenizer
from zoo.train.data.core.loader import Batch

Packing = Literal["cut", "packed"]
IGNORE = -100  # target of a position that is not scored


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents.

    Attributes:
        tokens: the flat array, (N + 1,), N of them targets; may be memory-mapped.
        starts: where each document's start symbol is, and last its end symbol, (n + 1,) int64.
        extra: bytes of each document that the lengths of its tokens miss, (n,) int64: counted at its end symbol, so
            that the bytes of a corpus are exact for every tokenizer.
    """

    tokens: np.ndarray
    starts: np.ndarray
    extra: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens) - 1

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: Tokenizer) -> "Corpus":
        """Tokenise documents in their order; empty ones are left out."""
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        lengths = tokenizer.byte_lengths()
        end = np.array([tokenizer.eos_id], dtype)
        parts, starts, extra, position = [end], [0], [], 0
        for text in texts:
            if not text:
                continue
            ids = tokenizer.encode_array(text)
            parts += [ids.astype(dtype), end]
            position += len(ids) + 1
            starts.append(position)
            extra.append(len(text.encode()) - int(lengths[ids].sum()))
        return cls(np.concatenate(parts), np.array(starts, np.int64), np.array(extra, np.int64))

    def n_bytes(self, lengths: np.ndarray, first: int, last: int) -> int:
        """Bytes of text of the targets at tokens[first:last]; `lengths` is the tokenizer's `byte_lengths()`."""
        a, b = np.searchsorted(self.starts[1:], [first, last])
        return int(lengths[self.tokens[first:last]].sum() + self.extra[a:b].sum())


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n things in one epoch; numpy's Philox keyed by both."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)


class CutSource:
    """The flat array cut into sequences of one length, shuffled in training; documents follow each other in a row.

    In training the sequences that do not fill a last step are left for another epoch. Validation has them all, in
    order, and fills up with sequences that score nothing.
    """

    def __init__(self, corpus: Corpus, lengths: np.ndarray, *, seq_len: int, batch_size: int, seed: int | None):
        self.corpus, self.lengths, self.seq_len, self.batch_size, self.seed = corpus, lengths, seq_len, batch_size, seed
        self.n = -(-len(corpus) // seq_len)  # the last one may be short
        self._order: tuple[int, np.ndarray] | None = None

    def steps(self, world: int) -> int:
        """Full steps in training, all in validation."""
        each = self.batch_size * world
        return self.n // each if self.seed is not None else -(-self.n // each)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """Rows rank, rank + world, ... of the step's."""
        rows = (step * self.batch_size + np.arange(self.batch_size)) * world + rank
        if self.seed is not None:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, order(self.n, self.seed, epoch)
            rows = self._order[1][rows]
        tokens = np.zeros((self.batch_size, self.seq_len), np.int64)
        targets = np.full((self.batch_size, self.seq_len), IGNORE)
        n_bytes = 0
        for i, row in enumerate(rows.tolist()):
            first = row * self.seq_len
            here = self.corpus.tokens[first : first + self.seq_len + 1].astype(np.int64)
            if len(here) < 2:  # past the end: a row of padding
                continue
            tokens[i, : len(here) - 1], targets[i, : len(here) - 1] = here[:-1], here[1:]
            n_bytes += self.corpus.n_bytes(self.lengths, first + 1, first + len(here))
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "n_bytes": torch.tensor(n_bytes),
        }


class PackedSource:
    """Rows of batch_size * seq_len tokens of whole documents, shuffled in training; `cu_seqlens` keeps them apart.

    A document goes on in the next row where a row ends, with a fresh state. Training leaves out the last, short row of
    an epoch; validation fills it up with a stretch of its own that scores nothing.

    Args:
        corpus: the documents.
        lengths: the tokenizer's `byte_lengths()`.
        seq_len, batch_size: a row has seq_len * batch_size tokens.
        seed: of the order of documents; None keeps theirs and has them all, for validation.
        longest: documents also begin anew at every multiple of so many tokens of the whole text. When it divides the
            row, all numbers are the same for every batch_size and every number of ranks, since no cut depends on them.
    """

    def __init__(
        self,
        corpus: Corpus,
        lengths: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        seed: int | None,
        longest: int | None = None,
    ):
        self.corpus, self.lengths, self.seed, self.longest = corpus, lengths, seed, longest
        self.row = seq_len * batch_size
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def steps(self, world: int) -> int:
        """Full steps in training, all in validation."""
        each = self.row * world
        return len(self.corpus) // each if self.seed is not None else -(-len(self.corpus) // each)

    def _documents(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of documents, and where each starts when they are laid out in it."""
        if self._order is None or self._order[0] != epoch:
            sizes = np.diff(self.corpus.starts)
            documents = np.arange(len(sizes)) if self.seed is None else order(len(sizes), self.seed, epoch)
            self._order = epoch, documents, np.concatenate([[0], np.cumsum(sizes[documents])])
        return self._order[1:]

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """One row; ranks take turns."""
        documents, layout = self._documents(epoch)
        begin = (step * world + rank) * self.row
        end = min(begin + self.row, len(self.corpus))
        tokens = np.zeros(self.row, np.int64)
        targets = np.full(self.row, IGNORE)
        borders, n_bytes, position = [0], 0, begin
        i = int(np.searchsorted(layout, begin, side="right")) - 1
        while position < end:
            stop = min(int(layout[i + 1]), end)
            shift = int(self.corpus.starts[documents[i]] - layout[i])
            here = self.corpus.tokens[position + shift : stop + shift + 1].astype(np.int64)
            tokens[position - begin : stop - begin] = here[:-1]
            targets[position - begin : stop - begin] = here[1:]
            n_bytes += self.corpus.n_bytes(self.lengths, position + shift + 1, stop + shift + 1)
            if self.longest is not None:
                first = (position // self.longest + 1) * self.longest  # the next place after position
                borders += [at - begin for at in range(first, stop, self.longest)]
            borders.append(stop - begin)
            position, i = stop, i + 1
        if borders[-1] < self.row:
            borders.append(self.row)
        return {
            "tokens": torch.from_numpy(tokens[None]),
            "targets": torch.from_numpy(targets[None]),
            "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
            "n_bytes": torch.tensor(n_bytes),
        }


def validation_source(
    packing: Packing, corpus: Corpus, lengths: np.ndarray, *, seq_len: int, batch_size: int
) -> CutSource | PackedSource:
    """Every target once, in order, with at most seq_len tokens of context: the same for every batch_size and ranks."""
    if packing == "cut":
        return CutSource(corpus, lengths, seq_len=seq_len, batch_size=batch_size, seed=None)
    return PackedSource(corpus, lengths, seq_len=seq_len, batch_size=batch_size, seed=None, longest=seq_len)
