"""titans: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Titans

MIXERS = {
    "titans": MixerCase(lambda: Titans(D, n_heads=2, chunk_size=5)),
    "titans-matrix": MixerCase(lambda: Titans(D, n_heads=2, expansion=None, chunk_size=4), tier=EVERYTHING),
}

MODELS = {
    "titans": CausalCase(fields={"n_heads": 2, "chunk_size": 5}),
    "titans + window": CausalCase(
        name="titans",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "titans + attention(window=7, n_heads=2)"},
        tier=EVERYTHING,
    ),
}
