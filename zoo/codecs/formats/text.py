"""Text as ids: a tokenizer, seen as a codec."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from zoo import tokenizers
from zoo.codecs.codec import Codes, padded, register_codec
from zoo.errors import UserError

__all__ = ["TextCodec"]


@register_codec("text")
class TextCodec:
    """A tokenizer of `zoo.tokenizers` as a codec; its files in a checkpoint are the tokenizer's own.

    Args:
        tokenizer: frozen as it is; None to train SentencePiece by `fit`.
        vocab_size: of a tokenizer that is still to be trained.
    """

    streams = 1

    def __init__(self, tokenizer: tokenizers.Tokenizer | None = None, *, vocab_size: int = 1024):
        self._tokenizer, self._size = tokenizer, vocab_size

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer.

        Raises:
            UserError: it is not trained yet.
        """
        if self._tokenizer is None:
            raise UserError("a codec is used after fit; this TextCodec has no tokenizer yet")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of different tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    def fit(self, samples: Iterable[str]) -> Self:
        """Train a SentencePiece model on texts.

        Raises:
            UserError: the codec has a tokenizer.
        """
        if self._tokenizer is not None:
            raise UserError("a codec is fitted once, and this TextCodec has its tokenizer; make another one")
        self._tokenizer = tokenizers.SentencePieceTokenizer.train(samples, self._size)
        return self

    def encode(self, samples: Sequence[str]) -> Codes:
        """Ids (B, L) of texts, without start or end symbols."""
        return padded([torch.tensor(self.tokenizer.encode(text), dtype=torch.long) for text in samples])

    def decode(self, codes: Codes) -> list[str]:
        """The texts of ids (B, L)."""
        rows = zip(codes.ids.tolist(), codes.lengths.tolist(), strict=True)
        return [self.tokenizer.decode(ids[:length]) for ids, length in rows]

    def errors(self, samples: Sequence[str]) -> Mapping[str, float]:
        """`changed`: the share of texts that do not come back as they were."""
        back = self.decode(self.encode(samples))
        return {"changed": sum(a != b for a, b in zip(samples, back, strict=True)) / max(1, len(samples))}

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The codec around the tokenizer of a folder; see `zoo.tokenizers.load`."""
        return cls(tokenizers.load(folder))
