"""para_gru: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import ParaGRU

MIXERS = {
    "para_gru": MixerCase(lambda: ParaGRU(D, n_heads=2)),
    "para_gru-unbounded": MixerCase(lambda: ParaGRU(D, n_heads=1, recurrent_clip=None), tier=EVERYTHING),
}

MODELS = {
    "para_gru": CausalCase(
        published={"400m": 405_644_288, "1b": 1_415_268_352, "2.9b": 2_901_854_720, "7b": 6_756_896_768}
    )
}
