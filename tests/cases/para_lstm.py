"""para_lstm: what its proofs need."""

from case_table import CausalCase, D, MixerCase

from zoo.layers import ParaLSTM

MIXERS = {
    "para_lstm": MixerCase(lambda: ParaLSTM(D)),
}

MODELS = {
    "para_lstm": CausalCase(
        fields={"n_heads": 2},
        published={"400m": 405_693_440, "1b": 1_415_366_656, "2.9b": 2_902_018_560, "7b": 6_757_158_912},
    )
}
