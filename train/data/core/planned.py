"""Whole documents as batches: a rank's part of a plan, or a packed row where nothing plans.

A document of s tokens is s - 1 inputs and their targets, so that wherever it is cut every target is scored once.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.train.balance.plan import Piece, RankStep
from zoo.train.balance.sampler import BalancedBatchSampler
from zoo.train.balance.whole_documents import Dealt
from zoo.train.data.core.corpus import IGNORE, Corpus
from zoo.train.data.core.loader import Batch, Source

FILLER = 64  # tokens, none scored, of a row for a rank without a document: one for each rank that may share the row


class Documents(Protocol):
    """Token documents by number. lengths: (n,) int64, the inputs of each."""

    lengths: np.ndarray

    def read(self, document: int, first: int, last: int) -> Tensor:
        """Inputs [first, last) and the token after them, (last - first + 1,) int64."""
        ...

    def n_bytes(self, document: int, first: int, last: int) -> int | None:
        """Bytes of text of the targets of inputs [first, last); None where the documents are no text."""
        ...


class InMemory:
    """Documents that somebody has made: 1-D tensors of whole numbers, at least two tokens each.

    Raises:
        UserError: one that is none.
    """

    def __init__(self, documents: Sequence[Tensor]):
        for i, document in enumerate(documents):
            if document.ndim != 1 or len(document) < 2 or document.is_floating_point():
                raise UserError(
                    "documents must be 1-D tensors of at least two whole numbers, since the first predicts the second; "
                    f"number {i} is {tuple(document.shape)} of {document.dtype}: drop or correct it"
                )
        self.documents = documents
        self.lengths = np.array([len(document) - 1 for document in documents], np.int64)

    def read(self, document: int, first: int, last: int) -> Tensor:
        """Inputs [first, last) and the token after them."""
        return self.documents[document][first : last + 1].long()

    def n_bytes(self, document: int, first: int, last: int) -> int | None:
        """None: nobody knows how many bytes of text these tokens stand for."""
        return None


class FromCorpus:
    """The documents of a tokenised corpus: each begins with the symbol before it and ends with the one behind it."""

    def __init__(self, corpus: Corpus, byte_lengths: np.ndarray):
        self.corpus, self.byte_lengths = corpus, byte_lengths
        self.lengths = np.diff(corpus.starts)

    def read(self, document: int, first: int, last: int) -> Tensor:
        """Inputs [first, last) and the token after them."""
        start = int(self.corpus.starts[document])
        return torch.from_numpy(self.corpus.tokens[start + first : start + last + 1].astype(np.int64))

    def n_bytes(self, document: int, first: int, last: int) -> int | None:
        """Bytes of text of the targets of inputs [first, last)."""
        start = int(self.corpus.starts[document])
        return self.corpus.n_bytes(self.byte_lengths, start + first + 1, start + last + 1)


class AtMost:
    """Documents with more than `most` inputs go on as further documents, with a fresh state; no target is lost."""

    def __init__(self, inner: Documents, most: int):
        self.inner, self.most = inner, most
        parts = -(-inner.lengths // most)
        self.owner = np.repeat(np.arange(len(parts)), parts)
        self.begin = (np.arange(len(self.owner)) - np.repeat(np.cumsum(parts) - parts, parts)) * most
        self.lengths = np.minimum(most, inner.lengths[self.owner] - self.begin)

    def read(self, document: int, first: int, last: int) -> Tensor:
        """Inputs [first, last) and the token after them."""
        begin = int(self.begin[document])
        return self.inner.read(int(self.owner[document]), begin + first, begin + last)

    def n_bytes(self, document: int, first: int, last: int) -> int | None:
        """Bytes of text of the targets of inputs [first, last)."""
        begin = int(self.begin[document])
        return self.inner.n_bytes(int(self.owner[document]), begin + first, begin + last)


class PlanBatch:
    """A batch's plan as one rank sees it: micro-batches in the order in which it must run them.

    Args:
        ranks: for how many the plan is.
        digest: of the plan and of the tokens of all its documents, 60 bits: equal on all ranks.
        most: tokens of the largest micro-batch of any rank.
        micro_batches: (step, batch); there may be none, and one may have no token.
    """

    def __init__(self, ranks: int, digest: int, most: int, micro_batches: Sequence[tuple[RankStep, Batch]]):
        self.ranks, self.digest, self.most, self.micro_batches = ranks, digest, most, list(micro_batches)


class Plans(Source):
    """Batches of planned documents. A rank reads the tokens of the whole batch, for the digest, and keeps its part."""

    def __init__(self, documents: Documents, sampler: BalancedBatchSampler):
        self.documents, self.sampler = documents, sampler

    def steps(self, world: int) -> int:
        """Batches of the first epoch."""
        return self.sampler.batches(0)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> PlanBatch:
        """The micro-batches of `rank` in one step, with what all ranks must agree on."""
        plan = self.sampler.plan(epoch, step)
        digest = hashlib.sha256((plan.digest() + self.sampler.settings()).encode())
        for name, length in zip(plan.documents, plan.lengths, strict=True):
            digest.update(self.documents.read(name, 0, length).numpy().tobytes())
        micro_batches = [
            (each, stream(self.documents, each.pieces, each.cu_seqlens))
            for each in plan.for_rank(rank, idle=plan.lockstep)
        ]
        return PlanBatch(plan.ranks, int(digest.hexdigest()[:15], 16), plan.most, micro_batches)


class Rows(Source):
    """The same batches where nobody plans: whole documents dealt out to the ranks, a packed row for each."""

    def __init__(self, documents: Documents, sampler: BalancedBatchSampler):
        self.documents, self.sampler = documents, sampler

    def steps(self, world: int) -> int:
        """Batches of the first epoch; as many for any number of ranks."""
        return self.sampler.batches(0)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """One packed row of the whole documents of `rank`; a row of filler where it has none."""
        names = self.sampler.documents(epoch, step)
        plan = Dealt(world)(self.sampler.lengths[names]).named(names.tolist())
        steps = plan.for_rank(rank)
        if steps:
            return stream(self.documents, steps[0].pieces, steps[0].cu_seqlens)
        row = stream(self.documents, (), (0, FILLER))
        row["tokens"], row["targets"] = torch.zeros(1, FILLER, dtype=torch.int64), torch.full((1, FILLER), IGNORE)
        return row


def stream(documents: Documents, pieces: Sequence[Piece], cu_seqlens: Sequence[int]) -> Batch:
    """Pieces of documents side by side, "tokens" and "targets" (1, T), with "n_bytes" where they are text."""
    tokens, targets = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    n_bytes = documents.n_bytes(0, 0, 0)  # None where they are no text
    for document, start, end in pieces:
        here = documents.read(document, start, end)
        tokens.append(here[:-1])
        targets.append(here[1:])
        if n_bytes is not None:
            n_bytes += documents.n_bytes(document, start, end) or 0
    batch = {
        "tokens": torch.cat(tokens)[None],
        "targets": torch.cat(targets)[None],
        "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
    }
    return batch if n_bytes is None else batch | {"n_bytes": torch.tensor(n_bytes)}
