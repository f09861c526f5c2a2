"""Tokenizers of the Hugging Face library, from a tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from zoo.errors import UserError
from zoo.files import write_atomically
from zoo.tokenizers.base import DESCRIPTION, Stream, describe, read_json


class HuggingFaceTokenizer:
    """A `tokenizer.json` as most published checkpoints carry it, run by the `tokenizers` package."""

    # Names of end symbols, tried in this order when no configuration file beside the tokenizer says which it is.
    END_SYMBOLS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")

    MASK_SYMBOLS = ("[MASK]", "<mask>")  # what hides a token from a model that predicts it: BERT's, RoBERTa's

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"a tokenizer folder must hold tokenizer.json; {str(folder)!r} does not: check the path")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception for a file it cannot read
            raise UserError(
                f"tokenizer.json must be in the format of the `tokenizers` package; {str(path)!r} is not ({error}): "
                "copy the file again"
            ) from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._special = {
            id for id, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        }  # these are not text
        names = [*_declared_end_symbols(folder), *self.END_SYMBOLS]
        token = next((name for name in names if name in vocabulary), None)
        if token is None:
            raise UserError(
                f"a tokenizer needs an end symbol; {str(folder)!r} names none: "
                'add tokenizer_config.json with {"eos_token": "..."} beside tokenizer.json'
            )
        self.eos_token, self.eos_id = token, vocabulary[token]
        self.mask_id = next((vocabulary[name] for name in self.MASK_SYMBOLS if name in vocabulary), None)
        self._special.add(self.eos_id)
        # Models of zoo saw eos_id before every document; a foreign one saw what its template puts there.
        template = [] if (folder / DESCRIPTION).is_file() else self._tokenizer.encode("", add_special_tokens=True).ids
        self.start_id = template[0] if template else self.eos_id

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without the special symbols that the model's template would add.

        A special symbol that the text spells out, such as "<|endoftext|>", becomes that symbol.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """The numbers of `encode` as an array of int32."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special symbols give none."""
        return self._tokenizer.decode([i for i in ids if i not in self._special], skip_special_tokens=False)

    def stream(self) -> Stream:
        """An incremental decoder for any kind of tokenizer."""
        return _WindowStream(self)

    def byte_lengths(self) -> np.ndarray:
        """Length of each id's text, decoded alone: right for whole words, an estimate for parts of characters."""
        texts = self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        lengths = np.array([len(text.encode()) for text in texts])
        lengths[list(self._special)] = 0
        return lengths

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, the end symbol and the description."""
        text = self._tokenizer.to_str(pretty=False)
        write_atomically(Path(folder) / "tokenizer.json", lambda file: file.write(text.encode()))
        describe(folder, kind="huggingface", eos_token=self.eos_token)


class _WindowStream:
    """Decodes the ids since the last safe place together, because how one id reads may depend on the one before."""

    # Text that ends with n replacement characters may be n - 1 written ones of three bytes each and three bytes of an
    # unfinished character: 3 n ids. It is held back up to there; more ids are broken text, and so is a very long run.
    WAIT, LONGEST = 3, 64

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # ids at the front of the window whose text has been handed out
        self._special = tokenizer._special

    def push(self, id: int) -> str:
        if id in self._special or not 0 <= id < self._tokenizer.vocab_size:
            return ""
        self._ids.append(id)
        text = self._fresh()
        held, broken = len(self._ids) - self._given, len(text) - len(text.rstrip("\ufffd"))
        if not text or (held <= self.WAIT * broken and held < self.LONGEST):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text

    def finish(self) -> str:
        text = self._fresh()
        self._given = len(self._ids)
        return text

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        return self._tokenizer.decode(self._ids)[len(before) :]


def _declared_end_symbols(folder: Path) -> list[str]:
    """End symbols named by the files beside a tokenizer.json, the most binding first."""
    names = []
    for file in (DESCRIPTION, "tokenizer_config.json", "special_tokens_map.json"):
        symbol: Any = read_json(folder / file).get("eos_token")
        if isinstance(symbol, dict):
            symbol = symbol.get("content")
        if isinstance(symbol, str):
            names.append(symbol)
    return names
