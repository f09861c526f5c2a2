"""yaad: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Yaad

MIXERS = {
    "yaad": MixerCase(lambda: Yaad(D, n_heads=2, chunk_size=5)),
    "yaad-switch": MixerCase(lambda: Yaad(D, n_heads=1, huber="switch", chunk_size=7, conv_size=None), tier=EVERYTHING),
}

MODELS = {
    "yaad": CausalCase(fields={"n_heads": 2, "chunk_size": 5}),
    "yaad + window": CausalCase(
        name="yaad",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "yaad, attention(window=7, n_heads=2)"},
        tier=EVERYTHING,
    ),
}
