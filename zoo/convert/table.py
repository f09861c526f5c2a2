"""The table of foreign formats, found: each file of `formats/` names its own in `FORMATS`."""

from collections.abc import Mapping
from typing import Any

from zoo import _discover
from zoo.convert import formats
from zoo.convert.format import Format
from zoo.errors import UserError, remedy

FORMATS: tuple[Format, ...] = tuple(format for module in _discover.load_modules(formats) for format in module.FORMATS)


def recognise(values: Mapping[str, Any], source: str) -> Format:
    """The format that a config.json is of.

    Raises:
        UserError: none that zoo reads.
    """
    kind = values.get("model_type")
    for format in FORMATS:
        if kind in format.types or (kind is None and format.recognises(values)):
            return format
    known = [name for format in FORMATS for name in format.types]
    if not isinstance(kind, str):
        raise UserError(
            f"{source} describes no model that zoo reads: it says neither format 'zoo' nor a model_type; "
            "give a folder that zoo.save, transformers or flash-linear-attention wrote"
        )
    end = remedy(kind, known, f"it reads {', '.join(known)}")
    raise UserError(f"{source} says model_type {kind!r}, which zoo does not read{end}")


def writer(model: str) -> Format:
    """The format in which a model of the registry is exported.

    Raises:
        UserError: there is none.
    """
    for format in FORMATS:
        if model in format.models and format.undescribe is not None:
            return format
    known = sorted({name for format in FORMATS for name in format.models})
    raise UserError(f"no other library's format is known for model {model!r}; zoo exports {', '.join(known)}")
