"""Text as training data: hold documents out, tokenise once, cut or pack."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from zoo import tokenizers
from zoo.errors import UserError
from zoo.files import cache_folder, keep_in_cache
from zoo.train.data.core.base import DataModule, LoaderSettings, Metric, at_least
from zoo.train.data.core.corpus import Corpus, CutSource, PackedSource, Packing, validation_source
from zoo.train.data.core.loader import Source

SEQ_LEN, BATCH_SIZE, VAL_FRACTION = 256, 8, 0.1  # defaults of every text source
CACHED_TOKENS = 4 << 20  # smaller corpora tokenise in about a second, and are not worth a file


class Document(NamedTuple):
    """A text, and the name of its group: the hold-out takes all texts of one name or none."""

    group: str
    text: str


class TextSettings(DataModule):
    """The settings of all text, and the tokenizer they name."""

    metrics: tuple[Metric, ...] = ("bits_per_byte", "perplexity")

    def __init__(
        self,
        loading: LoaderSettings,
        *,
        seq_len: int,
        tokenizer: str,
        vocab_size: int | None,
        packing: Packing,
    ):
        super().__init__(loading)
        at_least("seq_len", seq_len, 1)
        if packing not in ("cut", "packed"):
            raise UserError(f"data.packing must be cut or packed; got {packing!r}: choose one of the two")
        if vocab_size is not None and tokenizer != "sentencepiece":
            raise UserError(
                f"data.vocab_size sizes a SentencePiece model; with data.tokenizer={tokenizer} it has no meaning: "
                "leave it out or set data.tokenizer=sentencepiece"
            )
        self.seq_len, self.packing, self.tokenizer_name = seq_len, packing, tokenizer
        self._wanted_vocab_size = 1024 if vocab_size is None else vocab_size

    def make_tokenizer(self, texts: Iterable[str]) -> tokenizers.Tokenizer:
        """The tokenizer that the settings name; SentencePiece learns from the texts."""
        if self.tokenizer_name == "bytes":
            return tokenizers.ByteTokenizer()
        if self.tokenizer_name == "sentencepiece":
            return tokenizers.SentencePieceTokenizer.train(texts, self._wanted_vocab_size)
        return tokenizers.load(self.tokenizer_name)


class TextData(TextSettings):
    """Text that fits into memory as tokens. A subclass gives the documents.

    Args:
        seq_len: tokens per sequence.
        batch_size: sequences per step and rank.
        tokenizer: "bytes", "sentencepiece" (trained on the training part, cached), or a folder with a tokenizer.
        vocab_size: size of the SentencePiece model; 1024 when omitted.
        packing: "cut" joins documents by the end symbol and cuts them to length, batches (B, T); "packed" makes one
            row of batch_size * seq_len tokens with `cu_seqlens`, in which no document sees another. In training a
            document begins anew where a row ends; in validation every seq_len tokens, as in "cut", so that what is
            measured does not depend on batch_size.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed: the order of training sequences, not what is held out.
        val_fraction: share of the bytes held out for validation.
    """

    def __init__(
        self,
        *,
        seq_len: int = SEQ_LEN,
        batch_size: int = BATCH_SIZE,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        packing: Packing = "cut",
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = VAL_FRACTION,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            seq_len=seq_len,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            packing=packing,
        )
        if not 0 < val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be between 0 and 1, both excluded; got {val_fraction}: 0.1 holds out a tenth"
            )
        self.val_fraction = val_fraction
        self._tokenizer: tokenizers.Tokenizer | None = None
        self._split: tuple[list[str], list[str]] | None = None

    @abstractmethod
    def documents(self) -> list[Document]:
        """All documents; which are held out does not depend on their order."""

    def fingerprint(self) -> str | None:
        """What the documents are read from, for the cache of tokens; None when nothing cheap identifies it."""
        return None

    @property
    def vocab_size(self) -> int:
        """The number of different tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:  # type: ignore[override]
        """The tokenizer of this text, made on first use."""
        if self._tokenizer is None:
            learns = self.tokenizer_name == "sentencepiece"
            self._tokenizer = self.make_tokenizer(self.split[0] if learns else ())
        return self._tokenizer

    @property
    def split(self) -> tuple[list[str], list[str]]:
        """Training and held-out texts."""
        if self._split is None:
            self._split = hold_out(self.documents(), self.val_fraction)
        return self._split

    def make_sources(self) -> tuple[Source, Source]:
        """Tokenise, or take the tokens from the cache, and cut or pack them."""
        train, val = self.corpora()
        if len(train) < self.seq_len:
            raise UserError(
                f"a corpus must hold at least one sequence; its training part has {len(train)} tokens and data.seq_len "
                f"is {self.seq_len}: give more text or lower data.seq_len"
            )
        lengths = self.tokenizer.byte_lengths()
        kind = CutSource if self.packing == "cut" else PackedSource
        return (
            kind(train, lengths, seq_len=self.seq_len, batch_size=self.batch_size, seed=self.seed),
            validation_source(self.packing, val, lengths, seq_len=self.seq_len, batch_size=self.batch_size),
        )

    def corpora(self) -> tuple[Corpus, Corpus]:
        """Training and held-out text as tokens."""
        folder = self._cache_key()
        if folder is not None and (cached := _load(folder)) is not None:
            return cached
        train, val = (Corpus.of(texts, self.tokenizer) for texts in self.split)
        self._split = None  # the texts are not needed any more
        if folder is not None and len(train) + len(val) >= CACHED_TOKENS:
            _store(folder, train, val)
        return train, val

    def _cache_key(self) -> str | None:
        fingerprint = self.fingerprint()
        if fingerprint is None or self.tokenizer_name == "sentencepiece":  # it needs the texts in any case
            return None
        lengths = self.tokenizer.byte_lengths().tobytes()
        probe = self.tokenizer.encode("The quick brown fox: 0123456789, naïve\n\tdéjà vu \u2581")
        key = json.dumps([1, fingerprint, self.val_fraction, self.tokenizer.eos_id, probe]).encode()
        return hashlib.blake2b(key + lengths, digest_size=16).hexdigest()


def hold_out(documents: list[Document], fraction: float) -> tuple[list[str], list[str]]:
    """Split into training and held-out texts, in the order in which they came.

    Whole documents, group by group in the order of a hash of the groups' names, as long as they fit into the fraction
    of the bytes, first those below a quarter of it, for variety: the order of the documents plays no part. When they
    are so few or so long that less than half of the fraction can be met, the end of every document is held out instead,
    from a line break on where there is one.

    Only the groups keep like texts on one side. Texts of different groups that repeat each other, as copies with small
    changes do, may be parted, and the ends of documents may repeat their beginnings: remove duplicates before.
    """
    sizes: dict[str, int] = {}
    for group, text in documents:
        sizes[group] = sizes.get(group, 0) + len(text.encode())
    wanted = fraction * sum(sizes.values())
    chosen: set[str] = set()
    held = 0
    shuffled = sorted(sizes, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    for most in (wanted / 4, wanted):
        for group in shuffled:
            if group not in chosen and sizes[group] <= most and held + sizes[group] <= wanted:
                chosen.add(group)
                held += sizes[group]
    if held >= wanted / 2:
        return (
            [text for group, text in documents if group not in chosen],
            [text for group, text in documents if group in chosen],
        )
    cuts = [_cut(document.text, fraction) for document in documents]
    return [text[:cut] for (_, text), cut in zip(documents, cuts, strict=True)], [
        text[cut:] for (_, text), cut in zip(documents, cuts, strict=True)
    ]


def _cut(text: str, fraction: float) -> int:
    at = len(text) - int(len(text) * fraction)
    line = text.find("\n", at - 1) + 1
    return line if 0 < line < len(text) else at


def _store(key: str, train: Corpus, val: Corpus) -> None:
    """One .npy per array; the last one written says that all are there."""
    for part, corpus in (("val", val), ("train", train)):
        for name in ("extra", "starts", "tokens"):
            path = cache_folder() / "tokens" / f"{key}.{part}.{name}.npy"
            keep_in_cache(path, partial(np.save, arr=getattr(corpus, name)))


def _load(key: str) -> tuple[Corpus, Corpus] | None:
    def read(part: str) -> Corpus:
        base = cache_folder() / "tokens"
        tokens, starts, extra = (
            np.load(base / f"{key}.{part}.{name}.npy", mmap_mode="r") for name in ("tokens", "starts", "extra")
        )
        return Corpus(tokens, starts, extra)

    try:
        return read("train"), read("val")
    except (OSError, ValueError, EOFError):  # missing, or damaged: it is made again
        return None
