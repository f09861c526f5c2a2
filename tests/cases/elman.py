"""elman: what its proofs need."""

from case_table import D, MixerCase

from zoo.layers import Elman

MIXERS = {
    "elman": MixerCase(lambda: Elman(D, n_heads=2)),
}
