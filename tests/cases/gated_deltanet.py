"""gated_deltanet: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import GatedDeltaNet

MIXERS = {
    "gated_deltanet": MixerCase(lambda: GatedDeltaNet(D, n_heads=2, head_dim=8)),
    "gated_deltanet-gva": MixerCase(
        lambda: GatedDeltaNet(D, n_heads=2, n_v_heads=4, head_dim=4, use_gate=False, conv_size=None), tier=EVERYTHING
    ),
}

MODELS = {"gated_deltanet": CausalCase(fields={"head_dim": 12}, published={"500m": 512_272_124, "1.3b": 1_387_348_732})}
