"""Decoding: generators that yield as they go, and the session that they decode in.

What a module of `decoders/` names in `__all__` is public here. `__init__.pyi` tells type checkers these names;
`python -m zoo.registry` writes it.
"""

from zoo import _discover
from zoo.decoding import decoders
from zoo.decoding.causal import refuse_unless_causal
from zoo.decoding.decoder import Decoder, Piece, Prompt, decode, register_decoder
from zoo.decoding.distribution import probabilities, sample
from zoo.decoding.generate import generate, generate_batch
from zoo.decoding.session import Session

__all__ = [
    "Decoder",
    "Piece",
    "Prompt",
    "Session",
    "decode",
    "generate",
    "generate_batch",
    "probabilities",
    "refuse_unless_causal",
    "register_decoder",
    "sample",
]

for _module in _discover.load_modules(decoders):
    for _name in _discover.public_names(_module):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
