"""Text of one's own: plain files, JSON lines, parquet."""

import codecs
import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from zoo.errors import UserError, did_you_mean
from zoo.train.data.core.corpus import Packing
from zoo.train.data.text.base import BATCH_SIZE, SEQ_LEN, VAL_FRACTION, Document, TextData

# The mark that a file begins with, and how Python calls what follows; UTF-32's begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
ZEROS = 0.1  # no text has so many; half of plain UTF-16 and three quarters of UTF-32 are zero bytes
TEXT, LINES, TABLES = {".txt", ".text", ".md", ".rst"}, {".jsonl", ".ndjson"}, {".parquet"}


class TextFiles(TextData):
    """Files on this machine. A plain file is one document, and so is every row of JSON lines or parquet.

    Documents are held out whole where there are enough of them, else the end of each (see `hold_out`). Equal documents
    stay on one side; others that repeat each other are not looked for. Documents are read into memory once; the tokens
    of large corpora are kept in the cache folder and mapped from there.

    Args:
        path: a file, a folder (every .txt, .text, .md, .rst, .jsonl, .ndjson and .parquet below it), or a glob.
        field: the field or column that holds the text.
        separator: splits plain files into documents, such as "<|endoftext|>"; the whole file is one when omitted.

    The other settings are those of `TextData`.
    """

    def __init__(
        self,
        *,
        path: str,
        field: str = "text",
        separator: str | None = None,
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
            seq_len=seq_len,
            batch_size=batch_size,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            packing=packing,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
        )
        if separator == "":
            raise UserError("data.separator must not be empty; got '': leave it out for one document per file")
        self.path, self.field, self.separator = path, field, separator
        self.files = find_files(path)

    def documents(self) -> list[Document]:
        """All documents that are not empty, in the order of the files."""
        texts = [text for file in self.files for text in self._read(file) if text]
        if not texts:
            raise UserError(
                f"data.path must hold text; {self.path!r} has none in its {_count(self.files)}: choose another path"
            )
        return [Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text) for text in texts]

    def fingerprint(self) -> str:
        """Names, sizes and times of the files, and how they are read."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return json.dumps([self.field, self.separator, stats])

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix.lower() in TABLES:
            return self._rows(file)
        if file.suffix.lower() in LINES:
            return self._lines(file)
        text = _read_text(file)
        return iter([text] if self.separator is None else text.split(self.separator))

    def _lines(self, file: Path) -> Iterator[str]:
        for number, line in enumerate(_read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"every line of a .jsonl file must be JSON; line {number} of {str(file)!r} is not ({error}): "
                    "correct it or leave the file out"
                ) from error
            yield self._text(row, f"line {number} of {str(file)!r}")

    def _rows(self, file: Path) -> Iterator[str]:
        try:
            rows = datasets.load_dataset("parquet", data_files=[str(file)], split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                yield self._text(row, f"row {number} of {str(file)!r}")
        except UserError:
            raise
        except Exception as error:  # pyarrow's and datasets' errors have no common base
            raise UserError(
                f"a .parquet file must be readable by pyarrow; {str(file)!r} is not ({type(error).__name__}): "
                "check that it is complete"
            ) from error

    def _text(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise UserError(f"every row must have named fields; {where} has none: write one object per line")
        if self.field not in row:
            names = ", ".join(map(str, row)) or "none"
            hint = did_you_mean(self.field, map(str, row))
            raise UserError(
                f"every row must have the field {self.field!r}; {where} has {names}{hint}: name it by data.field"
            )
        text = row[self.field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(
                f"the field {self.field!r} must hold text; {where} holds {type(text).__name__}: "
                "name the field with the text by data.field"
            )
        return text.encode("utf-8", errors="replace").decode()  # JSON can spell half of a surrogate pair


def find_files(path: str) -> list[Path]:
    """The files that a path names: itself, the known kinds below a folder, or what a glob matches; sorted."""
    if not path:
        raise UserError("data.path must name a file, a folder or a glob; it is empty: set data.path=FOLDER")
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        kinds = TEXT | LINES | TABLES
        files = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix.lower() in kinds)
        if not files:
            raise UserError(
                f"a folder must hold {', '.join(sorted(kinds))} files; {path!r} holds none: name other files by a "
                "glob, as in data.path='folder/*.log'"
            )
        return files
    files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"data.path must name a file, a folder or a glob that matches; {path!r} does not: check it")
    return files


def _read_text(file: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 when it begins with their mark, as Windows writes them."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"text files must be readable; {str(file)!r} is not ({error.strerror}): check its permissions"
        ) from error
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"text files must be UTF-8; {str(file)!r} is not (byte {error.start}): convert it, for example by "
            "iconv -f latin1 -t utf-8"
        ) from error
    if (zeros := text.count("\0")) > len(text) * ZEROS:
        raise UserError(
            f"text files must be UTF-8; {str(file)!r} has {zeros} zero bytes, as UTF-16 without its mark has: convert "
            "it, for example by iconv -f utf-16le -t utf-8"
        )
    return text


def _count(files: list[Path]) -> str:
    return "file" if len(files) == 1 else f"{len(files)} files"
