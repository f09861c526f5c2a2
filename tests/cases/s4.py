"""s4: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import S4

MIXERS = {
    "s4": MixerCase(lambda: S4(D, d_state=8, mode="dplr", n_ssm=2)),
    "s4d": MixerCase(lambda: S4(D, d_state=8)),
    "s4d-bilinear": MixerCase(lambda: S4(D, d_state=6, init="legs", rule="bilinear", n_ssm=1), tier=EVERYTHING),
}

MODELS = {"s4": CausalCase(fields={"d_state": 8, "mode": "dplr", "n_ssm": 2})}
