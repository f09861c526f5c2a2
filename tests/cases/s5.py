"""s5: what its proofs need."""

from case_table import EVERYTHING, D, MixerCase

from zoo.layers import S5

MIXERS = {
    "s5": MixerCase(lambda: S5(D, d_state=8, blocks=2)),
    "s5-full_glu": MixerCase(lambda: S5(D, d_state=8, gate="full_glu", clip=False), tier=EVERYTHING),
    "s5-half_glu1": MixerCase(lambda: S5(D, d_state=8, gate="half_glu1"), tier=EVERYTHING),
}
