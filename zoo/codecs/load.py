"""The codec of a folder, whatever its kind."""

import json
from pathlib import Path

from zoo.codecs.codec import CODECS, DESCRIPTION, FORMAT, VERSION, Codec
from zoo.errors import UserError, remedy

__all__ = ["load"]

TEXT = "text"


def load(folder: str | Path) -> Codec:
    """The codec that a folder holds: one that says its kind in codec.json, else a tokenizer as a codec of text.

    Raises:
        UserError: the folder holds none, one of an unknown kind, or one that cannot be read.
    """
    path = Path(folder) / DESCRIPTION
    kind = TEXT
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); take another copy") from error
        if not isinstance(said, dict) or said.get("format") != FORMAT or said.get("version") != VERSION:
            raise UserError(f"{path} does not describe a codec of version {VERSION}; save the codec again")
        kind = str(said.get("kind"))
    if kind not in CODECS:
        known = f"known are {', '.join(sorted(CODECS))}"
        raise UserError(f"no codec {kind!r}{remedy(kind, CODECS, known)}")
    codec: Codec = CODECS[kind].load(folder)
    return codec
