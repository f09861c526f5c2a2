"""aaren: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Aaren

MIXERS = {
    "aaren": MixerCase(lambda: Aaren(D, n_heads=2)),
    "aaren-conv": MixerCase(lambda: Aaren(D, n_heads=4, use_wq=False, bias=False, conv_size=3), tier=EVERYTHING),
}

MODELS = {
    "aaren": CausalCase(fields={"n_heads": 2}),
    "aaren, convolutions": CausalCase(name="aaren", fields={"n_heads": 2, "conv_size": 4}, tier=EVERYTHING),
    "aaren + window": CausalCase(
        name="aaren", fields={"n_heads": 2, "pattern": "aaren, attention(window=7, n_heads=2)"}, tier=EVERYTHING
    ),
}
