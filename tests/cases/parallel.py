"""Mixers side by side: what their proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Attention, BidirectionalAttention, DeltaNet, GatedLinearAttention, Hydra, Mamba, Parallel

MIXERS = {
    "parallel": MixerCase(lambda: Parallel(D, [GatedLinearAttention(D, n_heads=2), Attention(D, n_heads=2, window=5)])),
    "parallel, mean of norms": MixerCase(
        lambda: Parallel(
            D, [Mamba(D, d_state=4), Attention(D, n_heads=2), DeltaNet(D, n_heads=2)], combine="mean", norm=True
        ),
        tier=EVERYTHING,
    ),
    "parallel, both sides": MixerCase(
        lambda: Parallel(D, [BidirectionalAttention(D, n_heads=2), Hydra(D, head_dim=8, d_state=4)]),
        bidirectional=True,
        tier=EVERYTHING,
    ),
}

MODELS = {
    "parallel mixers": CausalCase(
        name="gla",
        fields={"pattern": "(gla(n_heads=2) + attention(n_heads=2, window=5)), deltanet(n_heads=2)"},
    ),
}
