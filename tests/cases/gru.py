"""gru: what its proofs need."""

from case_table import CausalCase, D, MixerCase

from zoo.layers import GRU

MIXERS = {
    "gru": MixerCase(lambda: GRU(D, n_heads=2)),
}

MODELS = {"gru": CausalCase()}
