"""lact: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import LaCT

MIXERS = {
    "lact": MixerCase(lambda: LaCT(D, chunk_size=5)),
    "lact-descent": MixerCase(lambda: LaCT(D, muon_steps=0, chunk_size=4, conv_size=3), tier=EVERYTHING),
}

MODELS = {
    "lact": CausalCase(fields={"n_heads": 2, "chunk_size": 5, "window": 5}),
    # The gradient of 4 tokens has rank 4: its other singular values are rounding, which Muon makes 3.44**5 as large.
    "lact alone": CausalCase(
        name="lact",
        fields={"n_heads": 2, "chunk_size": 4, "pattern": "lact", "conv_size": 3},
        rounding=1e-4,
        tier=EVERYTHING,
    ),
}
