"""Chunks of actions as byte pairs of rounded cosines: FAST."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor

from zoo.codecs.action_chunks import ActionCodec
from zoo.codecs.codec import Codes, padded, register_codec
from zoo.errors import UsageError, UserError

__all__ = ["FASTCodec"]

FIRST = 0x4E00  # the character of the least coefficient; 20,000 letters without combining ones follow it
LETTERS = 20_000


@register_codec("fast")
class FASTCodec(ActionCodec):
    """Rounded coefficients of a cosine transform over time, lowest frequencies first, joined by byte-pair encoding.

    The number of tokens depends on the chunk. A prediction whose tokens do not add up to T D coefficients is malformed:
    `malformed` says which, and `decode` refuses them.

    Args:
        steps: T, actions of a chunk.
        scale: coefficients are multiplied by it and then rounded, above 0.
        vocab: tokens to learn, letters (different coefficients) included; fewer where no pair is left to join.
        cut: share of the actions on either side that lies outside [-1, 1] after normalisation.

    Source: arXiv 2501.09747.
    """

    def __init__(self, steps: int = 20, *, scale: float = 10.0, vocab: int = 1024, cut: float = 0.01):
        super().__init__(steps, cut=cut)
        if not 0 < scale < float("inf"):
            raise UsageError(f"scale must be above 0 and finite, got {scale}")
        if vocab < 2:
            raise UsageError(f"vocab must be at least 2, got {vocab}")
        self.scale, self.vocab = scale, vocab
        self._cosines = cosine_matrix(steps)
        self._least = self._letters = 0
        self._merges = torch.zeros(0, 2, dtype=torch.long)
        self._pieces: list[str] = []
        self._bpe: Tokenizer | None = None

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: letters, and joined pairs."""
        self._fitted()
        return len(self._pieces)

    @property
    def streams(self) -> int:
        """One token a step."""
        return 1

    def coefficients(self, chunks: Tensor) -> Tensor:
        """Rounded coefficients (B, T D) of normalised chunks (B, T, D), frequency by frequency, int64."""
        return (self._cosines @ chunks * self.scale).round().long().flatten(1)

    def learn(self, chunks: Tensor) -> None:
        """The letters, and the pairs to join.

        Raises:
            UserError: there are more letters than tokens.
        """
        numbers = self.coefficients(chunks)
        least, letters = int(numbers.min()), int(numbers.max() - numbers.min()) + 1
        if letters > min(self.vocab, LETTERS):
            raise UserError(
                f"vocab must hold every coefficient between the least and the largest, {letters} of them; got "
                f"{self.vocab}: raise it (to {LETTERS} at most) or lower scale"
            )
        self._least, self._letters = least, letters
        alphabet = [chr(FIRST + i) for i in range(letters)]
        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=self.vocab, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(self._texts(numbers), trainer)
        model = json.loads(bpe.to_str())["model"]
        ids = [[model["vocab"][part] for part in pair] for pair in model["merges"]]
        self._merges = torch.tensor(ids, dtype=torch.long).reshape(-1, 2)
        self._build()

    def _texts(self, numbers: Tensor) -> list[str]:
        inside = (numbers - self._least).clamp(0, self._letters - 1)
        return ["".join(chr(FIRST + n) for n in row) for row in inside.tolist()]

    def _build(self) -> None:
        """Tokens and their ids from letters and merges: a joined pair that is new gets the next id."""
        pieces = [chr(FIRST + i) for i in range(self._letters)]
        known, pairs = {piece: i for i, piece in enumerate(pieces)}, []
        for left, right in self._merges.tolist():
            pairs.append((pieces[left], pieces[right]))
            joined = pieces[left] + pieces[right]
            if joined not in known:
                known[joined] = len(pieces)
                pieces.append(joined)
        self._pieces, self._bpe = pieces, Tokenizer(models.BPE(vocab=known, merges=pairs))

    def encode(self, samples: Sequence[Tensor]) -> Codes:
        """Ids (B, L) of chunks (T, D), of different lengths.

        Raises:
            UserError: nothing is fitted; a chunk is of another size; an action is not finite.
        """
        texts = self._texts(self.coefficients(self.chunks(samples)))
        assert self._bpe is not None
        return padded([torch.tensor(self._bpe.encode(text).ids, dtype=torch.long) for text in texts])

    def letters(self, codes: Codes) -> list[str]:
        """What the tokens of each row spell, a letter a coefficient.

        Raises:
            UserError: an id is not of the vocabulary.
        """
        if codes.ids.numel() and not 0 <= int(codes.ids.min()) <= int(codes.ids.max()) < self.vocab_size:
            raise UserError(f"ids must be in [0, {self.vocab_size}); choose among the vocabulary only")
        rows = zip(codes.ids.tolist(), codes.lengths.tolist(), strict=True)
        return ["".join(self._pieces[i] for i in ids[:length]) for ids, length in rows]

    def malformed(self, codes: Codes) -> Tensor:
        """Which rows do not spell a chunk, (B,) bool."""
        whole = self.steps * self.width
        return torch.tensor([len(text) != whole for text in self.letters(codes)], dtype=torch.bool)

    def decode(self, codes: Codes) -> list[Tensor]:
        """Chunks (T, D), float64, of ids (B, L).

        Raises:
            UserError: a row does not spell a chunk.
        """
        width, texts = self.width, self.letters(codes)
        for row, text in enumerate(texts):
            if len(text) != self.steps * width:
                raise UserError(
                    f"tokens must spell {self.steps} x {width} coefficients; row {row} spells {len(text)}: it is "
                    "malformed, ask `malformed` first"
                )
        numbers = [[ord(letter) - FIRST + self._least for letter in text] for text in texts]
        coefficients = torch.tensor(numbers, dtype=torch.float64).reshape(-1, self.steps, width) / self.scale
        return list(self.restored(self._cosines.T @ coefficients).unbind(0))

    def clipped(self, samples: Sequence[Tensor]) -> float:
        """The share of the coefficients that lie outside the range that was learnt."""
        numbers = self.coefficients(self.chunks(samples)) - self._least
        return float(((numbers < 0) | (numbers >= self._letters)).double().mean())

    def settings(self) -> dict[str, Any]:
        """What is written to JSON: plain values."""
        return {"steps": self.steps, "cut": self.cut, "scale": self.scale, "vocab": self.vocab}

    def tensors(self) -> dict[str, Tensor]:
        """What is written to safetensors: the range of the actions, the letters, and the joined pairs."""
        if self._bpe is None:
            return {}
        return super().tensors() | {"letters": torch.tensor([self._least, self._letters]), "merges": self._merges}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        super().restore(tensors)
        self._least, self._letters = (int(n) for n in tensors["letters"])
        self._merges = tensors["merges"]
        self._build()


def cosine_matrix(steps: int) -> Tensor:
    """The orthonormal cosine transform of type II over `steps` values, (frequency, step) float64; its inverse is .T."""
    at = torch.arange(steps, dtype=torch.float64)
    waves: Tensor = torch.cos(torch.pi * (at + 0.5) * at[:, None] / steps) * (2 / steps) ** 0.5
    waves[0] /= 2**0.5
    return waves
