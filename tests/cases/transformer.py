"""Attention and the transformer: what its proofs need."""

from case_table import EVERYTHING, CausalCase, D, MixerCase

from zoo.layers import Attention

MIXERS = {
    "attention": MixerCase(lambda: Attention(D, n_heads=2)),
    "attention-gqa-qk_norm": MixerCase(lambda: Attention(D, n_heads=4, n_kv_heads=2, qk_norm=True), tier=EVERYTHING),
    "attention-window": MixerCase(lambda: Attention(D, n_heads=2, window=5), tier=EVERYTHING),
    "attention-window-1": MixerCase(lambda: Attention(D, n_heads=2, window=1, rope_base=None), tier=EVERYTHING),
}

MODELS = {"transformer": CausalCase(published={"340m": 373_867_520, "1.3b": 1_364_297_728, "7b": 7_241_732_096})}
