"""SentencePiece models, read or trained."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from zoo.errors import UserError
from zoo.files import cache_folder, keep_in_cache, write_atomically
from zoo.tokenizers.base import Stream, describe

TRAINING_BYTES = 32 << 20  # SentencePiece sees at most this much of a corpus: BPE counts settle long before
SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))  # no text needs them all
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")


class SentencePieceTokenizer:
    """A SentencePiece model; `train` makes one whose pieces spell any text exactly.

    Trained here: byte-pair merges with byte fallback, no normalisation, white space kept, line feed a piece.
    U+2581 is SentencePiece's own mark for a space. In a text it is spelled by its three bytes, so that it reads back as
    itself; a foreign model without byte pieces has it as an unknown character, like any other that it lacks.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError("a SentencePiece model needs an end symbol; this one has none: train it with eos_id >= 0")
        start = self._processor.bos_id()  # -1 for those trained here
        self.start_id = start if start >= 0 else self.eos_id
        ids = range(self.vocab_size)
        self._pieces = [self._piece_bytes(i) for i in ids]
        self._spelled = "".join(map(self._processor.id_to_piece, ids))  # to find characters that no piece has
        # Models not trained here may put a space before the text that encoding added and decoding takes away.
        spaced = next((i for i in ids if self._processor.id_to_piece(i).startswith(SPACE_MARK)), None)
        self._strips_first_space = spaced is not None and not self._processor.decode([spaced]).startswith(" ")

    def _piece_bytes(self, id: int) -> bytes:
        if self._processor.is_control(id) or self._processor.is_unused(id):
            return b""
        if self._processor.is_unknown(id):
            text: bytes = self._processor.decode([id]).encode()
            return text
        piece = self._processor.id_to_piece(id)
        if self._processor.is_byte(id) and (match := _BYTE_PIECE.match(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE_MARK, " ").encode()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 1024) -> "SentencePieceTokenizer":
        """The tokenizer of these texts, from the cache when the same was trained before.

        Args:
            texts: the documents; the first 32 MB are used, in the order in which they come.
            vocab_size: number of ids, the 256 bytes and the end symbol included.

        Raises:
            UserError: the texts have too few different pieces, or too many characters, for this size.
        """
        texts = list(_first_bytes(texts, TRAINING_BYTES))
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "byte_fallback": True,
            "character_coverage": 0.9999,  # rarer characters fall back to their bytes
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": ["\n"],
            "unk_id": 0,
            "eos_id": 1,
            "bos_id": -1,
            "pad_id": -1,
            "max_sentence_length": 65_536,
            "num_threads": 1,  # the order of ties depends on the number of threads
        }
        digest = hashlib.blake2b(json.dumps([sentencepiece.__version__, settings]).encode(), digest_size=16)
        for text in texts:
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text.encode())
        path = cache_folder() / "sentencepiece" / f"{digest.hexdigest()}.model"
        if path.exists():
            return cls(path.read_bytes())
        model = io.BytesIO()
        lines = (line for text in texts for line in text.splitlines() if line.strip())
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, minloglevel=2, **settings
            )
        except RuntimeError as error:
            reason = str(error).rsplit("] ", 1)[-1].strip() or "no text to learn from"
            reason = ". ".join(reason.split(". ")[:2]).rstrip(".")  # what follows is advice in terms of its own options
            raise UserError(
                f"a SentencePiece vocabulary must fit its corpus; {vocab_size} pieces do not fit these {len(texts)} "
                f"documents ({reason}): choose another data.vocab_size or data.tokenizer=bytes"
            ) from error
        keep_in_cache(path, lambda file: file.write(model.getvalue()))
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """The pieces of the text."""
        if SPACE_MARK not in text:
            ids: list[int] = self._processor.encode(text)
            return ids
        # Another character that neither text nor vocabulary has takes its place: it falls back to its own bytes.
        other = next(c for c in map(chr, _PRIVATE_USE) if c not in text and c not in self._spelled)
        ids = self._processor.encode(text.replace(SPACE_MARK, other))
        wanted, there = ([self._processor.piece_to_id(f"<0x{b:02X}>") for b in c.encode()] for c in (SPACE_MARK, other))
        at, size = 0, len(there)
        while at <= len(ids) - size:
            if ids[at : at + size] == there:
                ids[at : at + size] = wanted
                at += size
            else:
                at += 1
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """The pieces of the text, int32."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces; control symbols and unknown ids give none."""
        text = b"".join(self._pieces[i] for i in ids if i < self.vocab_size).decode(errors="replace")
        return text.removeprefix(" ") if self._strips_first_space else text

    def stream(self) -> Stream:
        """An incremental decoder that holds back unfinished byte pieces."""
        return _PieceStream(self._pieces, self._strips_first_space)

    def byte_lengths(self) -> np.ndarray:
        """Length of each piece in bytes."""
        return np.array([len(piece) for piece in self._pieces])

    def save(self, folder: str | Path) -> None:
        """Write the model and the description."""
        write_atomically(Path(folder) / "tokenizer.model", lambda file: file.write(self._model))
        describe(folder, kind="sentencepiece")


class _PieceStream:
    def __init__(self, pieces: list[bytes], strip_first_space: bool):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = strip_first_space

    def push(self, id: int) -> str:
        text = self._decoder.decode(self._pieces[id]) if id < len(self._pieces) else ""
        if text and self._strip:
            text, self._strip = text.removeprefix(" "), False
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterable[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text.encode())
