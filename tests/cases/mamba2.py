"""mamba2: what its proofs need."""

from case_table import CausalCase, D, MixerCase

from zoo.layers import Mamba2

MIXERS = {
    "mamba2": MixerCase(lambda: Mamba2(D, d_state=8, head_dim=8, n_groups=2)),
}

MODELS = {
    "mamba2": CausalCase(
        fields={"d_state": 8, "head_dim": 16, "n_groups": 2},
        published={
            "130m": 128_989_632,
            "370m": 368_346_624,
            "780m": 780_161_280,
            "1.3b": 1_343_757_312,
            "2.7b": 2_702_599_680,
        },
    )
}
