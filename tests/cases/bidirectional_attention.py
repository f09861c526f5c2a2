"""Attention over both sides: what its proofs need."""

from case_table import EVERYTHING, D, MixerCase

from zoo.layers import BidirectionalAttention

MIXERS = {
    "bidirectional_attention": MixerCase(lambda: BidirectionalAttention(D, n_heads=2), bidirectional=True),
    "bidirectional_attention-window": MixerCase(
        lambda: BidirectionalAttention(D, n_heads=2, window=15, rope_base=None, bias=True, qk_norm=True),
        bidirectional=True,
        tier=EVERYTHING,
    ),
}
