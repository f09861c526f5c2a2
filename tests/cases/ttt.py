"""ttt: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import TTT

MIXERS = {
    "ttt": MixerCase(lambda: TTT(D, n_heads=2, chunk_size=5)),
    "ttt-mlp": MixerCase(lambda: TTT(D, n_heads=2, learner="mlp", chunk_size=4, conv_size=None), tier=EVERYTHING),
}

MODELS = {
    "ttt": CausalCase(fields={"n_heads": 2, "chunk_size": 5}),
    "ttt, mlp": CausalCase(name="ttt", fields={"n_heads": 2, "chunk_size": 4, "learner": "mlp"}, tier=EVERYTHING),
}
