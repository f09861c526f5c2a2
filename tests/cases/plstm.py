"""plstm: what its proofs need."""

from case_table import CausalCase, D, MixerCase

from zoo.layers import PLSTM

MIXERS = {"plstm": MixerCase(lambda: PLSTM(D, n_heads=2, gate_std=0.5))}

MODELS = {"plstm": CausalCase(fields={"n_heads": 2})}
