"""Text to numbers and back: bytes, SentencePiece, or any folder with a `tokenizer.json`.

Every tokenizer has `encode`, `encode_array`, `decode`, `stream`, `byte_lengths`, `vocab_size`, `eos_id` and
`save`; `load` reads back what `save` wrote, and foreign folders. `eos_id` both ends and starts a document.
"""

from pathlib import Path

from zoo.errors import UserError
from zoo.tokenizers.base import DESCRIPTION, Stream, Tokenizer, read_json
from zoo.tokenizers.byte import ByteTokenizer
from zoo.tokenizers.hugging_face import HuggingFaceTokenizer
from zoo.tokenizers.sentence_piece import SPACE_MARK, SentencePieceTokenizer

__all__ = [
    "DESCRIPTION", "FILES", "SPACE_MARK", "ByteTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "Stream",
    "Tokenizer", "load",
]  # fmt: skip

FILES = (DESCRIPTION, "tokenizer.json", "tokenizer.model")  # a folder with one of them holds a tokenizer


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: one that `save` wrote, or a foreign tokenizer.json or tokenizer.model.

    Raises:
        UserError: the folder holds none, or one that cannot be read.
    """
    folder = Path(folder)
    described = read_json(folder / DESCRIPTION)
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
