"""memora: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Memora

MIXERS = {
    "memora": MixerCase(lambda: Memora(D, n_heads=2, chunk_size=5)),
    "memora-exact": MixerCase(lambda: Memora(D, n_heads=2, chunk_size=3, exact=True), tier=EVERYTHING),
}

MODELS = {
    # Positive weights have nearly equal outputs, and the norm magnifies what is left: with the cases' large gains a
    # whole forward pass in float32 is off by 4e-5 of one in float64, in any order of steps.
    "memora": CausalCase(fields={"n_heads": 2, "chunk_size": 5}, rounding=1e-4),
    "memora + window": CausalCase(
        name="memora",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "memora, attention(window=7, n_heads=2)"},
        rounding=1e-4,
        tier=EVERYTHING,
    ),
}
