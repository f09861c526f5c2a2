"""gla: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import GatedLinearAttention

MIXERS = {
    "gla": MixerCase(lambda: GatedLinearAttention(D, n_heads=2)),
    "gla-conv-gqa": MixerCase(
        lambda: GatedLinearAttention(D, n_heads=4, n_kv_heads=2, conv_size=4, gate_floor=-1.0), tier=EVERYTHING
    ),
}

MODELS = {"gla": CausalCase(published={"340m": 374_475_776, "1.3b": 1_365_514_240, "7b": 6_741_635_072})}
