"""moneta: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Moneta

MIXERS = {
    "moneta": MixerCase(lambda: Moneta(D, n_heads=2, chunk_size=5)),
    "moneta-l2": MixerCase(lambda: Moneta(D, n_heads=1, p=2, q=2.5, chunk_size=1, conv_size=None), tier=EVERYTHING),
}

MODELS = {
    "moneta": CausalCase(fields={"n_heads": 2, "chunk_size": 5}),
    "moneta + window": CausalCase(
        name="moneta",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "moneta, attention(window=7, n_heads=2)"},
        tier=EVERYTHING,
    ),
}
