"""hydra: what its proofs need."""

from case_table import D, EncoderCase, MixerCase

from zoo.layers import Hydra

MIXERS = {"hydra": MixerCase(lambda: Hydra(D, d_state=4, head_dim=8), bidirectional=True)}

MODELS = {
    "hydra": EncoderCase(fields={"d_state": 8, "head_dim": 16}, published={"ablation": 69_987_738, "base": 112_082_098})
}
