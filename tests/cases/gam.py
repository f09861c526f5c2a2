"""gam and gam_hybrid: what their proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import GAM

MIXERS = {
    "gam": MixerCase(lambda: GAM(D, n_slots=7)),
    "gam-wide": MixerCase(lambda: GAM(D, conv_size=9, score_scale=0.25), tier=EVERYTHING),
}

MODELS = {
    "gam": CausalCase(fields={"n_slots": 20}, published={"22.6m": 22_599_680}),
    "gam, no positions": CausalCase(name="gam", fields={"max_length": None, "conv_size": 5}, tier=EVERYTHING),
    "gam_hybrid": CausalCase(fields={"n_slots": 20, "n_heads": 2}),
    "gam_hybrid, deltanet": CausalCase(
        name="gam_hybrid", fields={"pattern": "gam, deltanet(n_heads=2)", "max_length": 256}, tier=EVERYTHING
    ),
}
