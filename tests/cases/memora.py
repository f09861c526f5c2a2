"""memora: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Memora

MIXERS = {
    "memora": MixerCase(lambda: Memora(D, n_heads=2, chunk_size=5)),
    "memora-exact": MixerCase(lambda: Memora(D, n_heads=2, chunk_size=3, exact=True), tier=EVERYTHING),
}

MODELS = {
    "memora": CausalCase(fields={"n_heads": 2, "chunk_size": 5}),
    "memora + window": CausalCase(
        name="memora",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "memora, attention(window=7, n_heads=2)"},
        tier=EVERYTHING,
    ),
}
