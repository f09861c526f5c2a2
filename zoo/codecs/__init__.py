"""Codecs: whatever becomes tokens does so by one of them, and comes back by the same.

What a module of `formats/` names in `__all__` is public here. `__init__.pyi` tells type checkers these names;
`python -m zoo.registry` writes it.
"""

from zoo import _discover
from zoo.codecs import formats
from zoo.codecs.codec import Codec, Codes, StoredCodec, padded, register_codec
from zoo.codecs.load import load

__all__ = ["Codec", "Codes", "StoredCodec", "load", "padded", "register_codec"]

for _module in _discover.load_modules(formats):
    for _name in _discover.public_names(_module):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
