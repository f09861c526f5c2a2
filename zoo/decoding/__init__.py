"""Decoding: generators that yield as they go."""

from zoo.decoding.sampling import generate, generate_batch, sample

__all__ = ["generate", "generate_batch", "sample"]
