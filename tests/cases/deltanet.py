"""deltanet: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import DeltaNet

MIXERS = {
    "deltanet": MixerCase(lambda: DeltaNet(D, n_heads=2)),
    "deltanet-options": MixerCase(
        lambda: DeltaNet(
            D, n_heads=2, conv_size=None, qk_activation="elu", qk_norm="sum", use_gate=True, allow_neg_eigval=True
        ),
        tier=EVERYTHING,
    ),
    "deltanet-bare": MixerCase(
        lambda: DeltaNet(D, n_heads=2, qk_activation="identity", use_beta=False, use_output_norm=False), tier=EVERYTHING
    ),
}

MODELS = {"deltanet": CausalCase(published={"340m": 374_362_112, "1.3b": 1_365_677_056})}
