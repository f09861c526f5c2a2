"""Decoding: generators that yield as they go."""

from zoo.decoding.sampling import generate, generate_batch, refuse_unless_causal, sample

__all__ = ["generate", "generate_batch", "refuse_unless_causal", "sample"]
