"""Text to numbers and back: bytes, SentencePiece, or any folder with a `tokenizer.json`.

Every tokenizer has `encode`, `encode_array`, `decode`, `stream`, `byte_lengths`, `vocab_size`, `eos_id` and
`save`; `load` reads back what `save` wrote, and foreign folders. `eos_id` both ends and starts a document.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from zoo.errors import UserError
from zoo.files import cache_folder, keep_in_cache, write_atomically

DESCRIPTION = "zoo_tokenizer.json"  # what kind of tokenizer a saved folder holds
FILES = (DESCRIPTION, "tokenizer.json", "tokenizer.model")  # a folder with one of them holds a tokenizer
TRAINING_BYTES = 32 << 20  # SentencePiece sees at most this much of a corpus: BPE counts settle long before
SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))  # no text needs them all
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")


class Stream(Protocol):
    """Decodes one id at a time and never hands out part of a character."""

    def push(self, id: int) -> str:
        """The text that became certain with this id; often one word, sometimes nothing yet."""
        ...

    def finish(self) -> str:
        """What is still held back when no more ids come: the replacement character for a broken one."""
        ...


class Tokenizer(Protocol):
    """What data, checkpoints and generation expect of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int:
        """The id between documents: the end of one and the start of the next."""
        ...

    @property
    def start_id(self) -> int:
        """The id that a generated document starts with: eos_id, or what a foreign model was trained with."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without start or end symbols."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as a one-dimensional array of integers."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special symbols give none, broken UTF-8 gives replacement characters."""
        ...

    def stream(self) -> Stream:
        """A new incremental decoder; all it returns, joined, is `decode` of all it was given."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (vocab_size,) int64; special symbols stand for 0."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write everything that `load` needs into the folder."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as they are: ids 0-255 are bytes, 256 starts and ends a document."""

    vocab_size = 257
    eos_id = 256
    start_id = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of the text, uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; 256 and above are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream(self) -> Stream:
        """An incremental UTF-8 decoder."""
        return _ByteStream()

    def byte_lengths(self) -> np.ndarray:
        """One for each byte, zero for the document symbol."""
        return np.array([1] * 256 + [0])

    def save(self, folder: str | Path) -> None:
        """Write the description; there is nothing else to a byte tokenizer."""
        _describe(folder, kind="bytes")


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(bytes([id])) if id < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


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
        _describe(folder, kind="sentencepiece")


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
        _describe(folder, kind="huggingface", eos_token=self.eos_token)


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


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: one that `save` wrote, or a foreign tokenizer.json or tokenizer.model.

    Raises:
        UserError: the folder holds none, or one that cannot be read.
    """
    folder = Path(folder)
    described = _read_json(folder / DESCRIPTION)
    kind = described.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind not in (None, "sentencepiece", "huggingface"):
        raise UserError(
            f"{DESCRIPTION} must name bytes, sentencepiece or huggingface; {str(folder)!r} names {kind!r}: "
            "save the tokenizer again"
        )
    if kind == "huggingface" or (kind is None and (folder / "tokenizer.json").is_file()):
        return HuggingFaceTokenizer(folder)
    model = folder / "tokenizer.model"
    if not model.is_file():
        raise UserError(
            f"a tokenizer folder must hold {DESCRIPTION}, tokenizer.json or tokenizer.model; {str(folder)!r} holds "
            "none of them: check the path"
        )
    try:
        return SentencePieceTokenizer(model.read_bytes())
    except RuntimeError as error:
        raise UserError(
            f"tokenizer.model must be a SentencePiece model; {str(model)!r} cannot be read: copy the file again"
        ) from error


def _declared_end_symbols(folder: Path) -> list[str]:
    """End symbols named by the files beside a tokenizer.json, the most binding first."""
    names = []
    for file in (DESCRIPTION, "tokenizer_config.json", "special_tokens_map.json"):
        symbol: Any = _read_json(folder / file).get("eos_token")
        if isinstance(symbol, dict):
            symbol = symbol.get("content")
        if isinstance(symbol, str):
            names.append(symbol)
    return names


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"a .json file must be JSON; {str(path)!r} is not ({error}): copy the file again") from error
    return content if isinstance(content, dict) else {}


def _describe(folder: str | Path, **description: str) -> None:
    content = json.dumps({"format": "zoo-tokenizer", "version": 1, **description}, indent=2).encode() + b"\n"
    write_atomically(Path(folder) / DESCRIPTION, lambda file: file.write(content))


def _first_bytes(texts: Iterable[str], limit: int) -> Iterable[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text.encode())
