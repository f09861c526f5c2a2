"""lstm: what its proofs need."""

from case_table import CausalCase, D, MixerCase

from zoo.layers import LSTM

MIXERS = {
    "lstm": MixerCase(lambda: LSTM(D, n_heads=2)),
}

MODELS = {"lstm": CausalCase()}
