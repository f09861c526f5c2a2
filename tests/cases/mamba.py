"""mamba: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Mamba

MIXERS = {
    "mamba": MixerCase(lambda: Mamba(D, d_state=4)),
    "mamba-constant": MixerCase(lambda: Mamba(D, d_state=4, selective=False), tier=EVERYTHING),
}

MODELS = {
    "mamba": CausalCase(
        fields={"d_state": 4},
        published={
            "130m": 129_135_360,
            "370m": 371_516_416,
            "790m": 793_204_224,
            "1.4b": 1_372_178_432,
            "2.8b": 2_768_345_600,
        },
    )
}
