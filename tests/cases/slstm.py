"""slstm: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import SLSTM

MIXERS = {
    "slstm": MixerCase(lambda: SLSTM(D, n_heads=2)),
    "slstm-bare": MixerCase(lambda: SLSTM(D, n_heads=1, conv_size=None, depth=1.0), tier=EVERYTHING),
}

MODELS = {"slstm": CausalCase()}
